"""The report says what the records say, in words too, and holds nothing that runs or calls out."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from report_runs import about, rounds

from sparkdeep.tracking.callbacks import FitInfo
from sparkdeep.tracking.charts import HEIGHT, WIDTH, Line, line_chart, seconds, short, stacked_bars
from sparkdeep.tracking.records import write_jsonl
from sparkdeep.tracking.report import About, main, render, write

_VOID = {"meta", "link"}


class Page(HTMLParser):
    """Tags with their attributes, and the text; refuses a page whose tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] != "style":
            self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


RUNS = {
    "none": [],
    "one": rounds(1, replicas=1, hosts=1),
    "many": rounds(1500, retried=(57,)),
    "all NaN": rounds(12, nan=range(1, 13)),
    "no time": [dataclasses.replace(record, seconds=0.0, compute_seconds=0.0, stage_seconds=0.0, exchange_seconds=0.0,
                                    outer_seconds=0.0, replicas=[]) for record in rounds(3)],
}  # fmt: skip


@pytest.mark.parametrize("records", RUNS.values(), ids=RUNS.keys())
def test_a_page_is_whole_titled_and_needs_nothing_from_elsewhere(records):
    text = render(records, about())
    page = Page(text)
    assert text.lstrip().startswith("<!doctype html>")
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert "digits" in page.words
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "object", "embed", "form", "base"})
    assert [a["href"] for a in page.all("link")] == ["data:,"]
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\son[a-z]+=|javascript:", text)
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    for drawing in page.all("svg"):
        assert drawing["role"] == "img"
        assert len(drawing["aria-label"]) > 10
    assert "nan" not in " ".join(a.get("d", "") + a.get("height", "") + a.get("y", "") for _, a in page.tags)
    assert len(text) < 400_000


def test_settings_and_errors_are_text_whatever_they_hold():
    attack = "<script>alert(1)</script>\"'&"
    text = render(
        rounds(2),
        about(settings={attack: attack, "nested": {"a": [attack]}}, error=attack, title=attack, scores={attack: 1.0}),
    )
    page = Page(text)
    assert not page.all("script")
    assert page.words.count(attack) >= 5
    host = dataclasses.replace(rounds(1)[0].replicas[0], host=attack)
    assert not Page(render([dataclasses.replace(rounds(1)[0], replicas=[host])])).all("script")


def test_the_numbers_are_those_of_the_records():
    records = rounds(120, retried=(57,))
    words = Page(render(records, about())).words
    total = sum(record.seconds for record in records)
    parts = {
        "compute": sum(r.compute_seconds for r in records),
        "exchange": sum(r.exchange_seconds for r in records),
        "outer step": sum(r.outer_seconds for r in records),
        "opening stages": sum(r.stage_seconds for r in records),
        "validation": sum(r.validation_seconds for r in records),
        "checkpoints": sum(r.checkpoint_seconds for r in records),
        "other": 120 * 0.0008,
    }
    assert sum(parts.values()) == pytest.approx(total)
    for name, value in parts.items():
        assert f"{name} {seconds(value)} {100 * value / total:.1f} %" in words
    assert "Round 57 took 2 attempts." in words
    assert "accuracy 0.9886" in words.replace("0.9886 accuracy", "accuracy 0.9886")
    speed = 76_800 / sum(r.replicas[2].compute_seconds for r in records)
    assert f"2 worker-0.cluster.example 76,800 {short(speed)} 6 % 0 %" in words
    one, three = (sum(r.replicas[i].compute_seconds for r in records) for i in (0, 2))
    assert f"worker-0.cluster.example 2 153,600 {short(76_800 / one + speed)}" in words
    assert f"0 worker-0.cluster.example 76,800 {short(76_800 / one)} 6 % {100 * (1 - one / three):.0f} %" in words


def test_what_is_not_set_is_named_once_and_factories_read_like_calls():
    words = Page(render([], about())).words
    assert "Not set: weight_col." in words
    assert "torch.optim.sgd.SGD(lr=0.1, momentum=0.9)" in words
    assert "torch.nn.modules.loss.CrossEntropyLoss(reduction=mean)" in words


def test_of_a_round_that_was_run_again_the_last_counts_and_order_does_not():
    once = rounds(4)
    again = [*once, dataclasses.replace(once[2], loss=once[2].loss)]
    assert render(again) == render(once) == render(reversed(once))
    other = [*once, dataclasses.replace(once[2], loss=9.0)]
    assert render(other) != render(once)


def test_a_run_that_ended_early_shows_how_far_it_came_and_why():
    page = Page(render(rounds(30), about(status="failed", error="NonFiniteError: replica 1\nround 31")))
    assert "30 of 120 rounds" in page.words.replace("rounds 30 of 120", "30 of 120 rounds")
    assert "Why it ended NonFiniteError: replica 1 round 31" in page.words
    assert {"class": "status failed"} in page.all("span")


def test_every_round_is_in_the_table_up_to_two_hundred():
    assert len(Page(render(rounds(200))).all("tr")) - len(Page(render([])).all("tr")) > 200
    page = Page(render(rounds(1500)))
    assert "One round in 8 as a table" in page.words
    assert len(page.all("tr")) < 230


# -- charts -----------------------------------------------------------------------------------------------------------


def points_of(path):
    return [tuple(map(float, pair.split())) for pair in path.lstrip("M").split("L")]


def test_a_line_goes_where_the_values_are():
    chart = line_chart("Loss", [Line(name="a", color="c0", points=[(1, 4.0), (2, 2.0), (5, 0.0)])], shown=short)
    ((_, path),) = chart.paths
    (x1, y1), (x2, y2), (x5, y5) = points_of(path)
    assert 0 <= x1 < x2 < x5 <= WIDTH
    assert (x2 - x1) * 3 == pytest.approx(x5 - x2, abs=0.5)
    assert 0 <= y1 < y2 < y5 <= HEIGHT
    assert y2 - y1 == pytest.approx(y5 - y2, abs=0.2)
    assert {text for _, text in chart.y_ticks} >= {"0", "4"}
    top = {text: at for at, text in chart.y_ticks}
    assert top["4"] * HEIGHT / 100 == pytest.approx(y1, abs=0.1)
    assert chart.label.startswith(
        "Loss by round. a: 4 in round 1, 0 in round 5; least 0 in round 5, most 4 in round 1."
    )


def test_values_far_apart_are_shown_on_a_logarithmic_scale_that_says_so():
    points = [(k, 10.0 ** (2 - k)) for k in range(5)]
    chart = line_chart("Loss", [Line(name="a", color="c0", points=points)], shown=short)
    heights = [y for _, y in points_of(chart.paths[0][1])]
    steps = [b - a for a, b in itertools.pairwise(heights)]
    assert steps == pytest.approx([steps[0]] * 4, abs=0.2)
    assert chart.notes == ["The scale is logarithmic."]


def test_values_that_are_no_numbers_leave_gaps_that_are_named():
    values = [1.0, 2.0, math.nan, math.inf, 3.0, 2.0, math.nan, 1.0]
    chart = line_chart("Loss", [Line(name="a", color="c0", points=list(enumerate(values)))], shown=short)
    assert [len(points_of(path)) for _, path in chart.paths] == [2, 2]
    assert chart.notes == ["No finite number in rounds 2, 3, 6."]


def test_a_spike_among_thousands_of_rounds_stays_visible():
    points = [(k, 1.0) for k in range(20_000)]
    points[12_345] = (12_345, 5.0)
    chart = line_chart("Loss", [Line(name="a", color="c0", points=points)], shown=short)
    drawn = points_of(chart.paths[0][1])
    assert len(drawn) <= 1000
    assert min(y for _, y in drawn) < HEIGHT * 0.1


def test_bars_stand_on_each_other_and_add_up():
    chart = stacked_bars("t", [1, 2], [("a", "a", [1.0, 3.0]), ("b", "b", [1.0, 0.0])], label="x")
    (_, x0, top_a, width, a), (_, x1, top_b, _, b), (_, x2, _, _, c) = chart.bars
    assert x0 == x1 < x2
    assert width < WIDTH / 2
    assert a == pytest.approx(b)
    assert c == pytest.approx(3 * a)
    assert top_b + b == pytest.approx(top_a, abs=0.02)
    assert top_a + a == pytest.approx(HEIGHT, abs=0.02)
    many = stacked_bars("t", list(range(1, 1001)), [("a", "a", [2.0] * 1000)], label="x")
    assert len(many.bars) <= 120
    assert many.notes == ["Each bar is the mean of 9 rounds."]
    assert len({bar[4] for bar in many.bars}) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.02824, "0.02824"), (1.5e-7, "1.5e-07"), (12.5, "12.5"), (1006.2, "1,006"), (101_500.0, "101.5k"),
     (2.5e6, "2.5M"), (-3.0, "-3"), (math.nan, "NaN"), (math.inf, "infinite")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 s"), (5e-5, "50 µs"), (0.0592, "59.2 ms"), (4.25, "4.25 s"), (200.0, "3 min 20 s"), (7500.0, "2 h 5 min"),
     (119.7, "2 min 0 s"), (0.99996, "1 s"), (3599.9, "1 h 0 min"), (math.nan, "NaN")],
)  # fmt: skip
def test_durations_are_short(value, text):
    assert seconds(value) == text


# -- from files -------------------------------------------------------------------------------------------------------


def test_a_report_is_made_from_the_files_of_a_job(tmp_path, capsys):
    folder = tmp_path / "digits"
    folder.mkdir()
    write_jsonl(rounds(7), folder / "rounds.jsonl")
    result = {"status": "failed", "error": {"type": "X", "message": "no <room>"}, "accuracy": 0.875, "seconds": 3.5,
              "versions": {"torch": "1.2.3"}}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    words = Page((folder / "report.html").read_text()).words
    for part in ("digits failed", "X: no <room>", "accuracy 0.875", "torch 1.2.3"):
        assert part in words
    out = tmp_path / "other.html"
    assert main([str(folder / "rounds.jsonl"), "-o", str(out), "--title", "mine"]) == 0
    assert "mine" in Page(out.read_text()).words


def test_files_that_cannot_be_read_are_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "rounds.jsonl" in capsys.readouterr().err
    for content in ("{", '{"a": 1}', "[]", '"x"'):
        (tmp_path / "rounds.jsonl").write_text(content)
        assert main([str(tmp_path)]) == 2
        assert "no round record" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_it_runs_as_a_module_without_spark(tmp_path):
    write_jsonl(rounds(3), tmp_path / "rounds.jsonl")
    code = "import sys, runpy; sys.argv[1:] = [sys.argv[1]]\n"
    code += "try: runpy.run_module('sparkdeep.tracking.report', run_name='__main__')\n"
    code += "except SystemExit as end: assert end.code == 0, end.code\n"
    code += "assert 'pyspark' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], check=True, timeout=60)
    assert (tmp_path / "report.html").is_file()


def test_versions_are_those_of_this_process_unless_given(tmp_path):
    write(rounds(1), tmp_path / "r.html", About(title="t"))
    words = Page((tmp_path / "r.html").read_text(encoding="utf-8")).words
    assert f"python {sys.version_info.major}.{sys.version_info.minor}" in words
    assert html.escape("torch") in words
    assert "Versions" not in Page(render(rounds(1), About(versions={}))).words


# -- from a job -------------------------------------------------------------------------------------------------------

_JOB = """
[data]
source = "parquet"
path = "nowhere"
[model]
factory = "torch.nn:Linear"
args = { in_features = 2, out_features = 1 }
[loss]
name = "torch.nn:MSELoss"
[optimizer]
name = "torch.optim:SGD"
args = { lr = 0.1 }
[fit]
feature_cols = ["x"]
label_cols = "y"
epochs = 12
"""


def job(tmp_path, work, text=_JOB):
    """Runs a job's work; returns its exit code and the report's words, None without a report."""
    from sparkdeep.spark.job.run import run_job

    (tmp_path / "small.toml").write_text(f'{text}\n[output]\ndir = "{tmp_path}/out"\n')
    code = run_job(work, description="", result_name="result.json", argv=[str(tmp_path / "small.toml")])
    page = tmp_path / "out" / "report.html"
    return code, Page(page.read_text(encoding="utf-8")).words if page.exists() else None


def told(made, count):
    """What a fit tells the job's own callback."""
    (watch,) = made.getCallbacks()
    info = FitInfo(run="r", num_rounds=120, committed=0, rows=640, num_parameters=3, settings={"batch_size": 77})
    watch.on_fit_start(info)
    for record in rounds(count):
        watch.on_round_end(record)


def test_a_job_reports_its_rounds_scores_and_settings(tmp_path):
    def work(job):
        told(job.estimator(), 120)
        job.result["accuracy"] = 0.875

    code, words = job(tmp_path, work)
    assert code == 0
    for part in ("small done", "accuracy 0.875", "rounds 120", "training rows 640", "parameters 3", "batch_size 77"):
        assert part in words


def test_a_job_that_fails_reports_the_rounds_it_has(tmp_path):
    def work(job):
        told(job.estimator(), 30)
        raise RuntimeError("no luck")

    code, words = job(tmp_path, work)
    assert code == 1
    for part in ("small failed", "RuntimeError: no luck", "rounds 30 of 120", "batch_size 77"):
        assert part in words


def test_a_job_that_fails_before_its_first_round_reports_what_the_file_says(tmp_path):
    def work(job):
        job.estimator()
        raise RuntimeError("no rows")

    _, words = job(tmp_path, work)
    for part in ("RuntimeError: no rows", "rounds 0", "No round was committed.", "epochs 12", "model torch.nn:Linear"):
        assert part in words


def test_a_job_that_trains_nothing_has_no_report(tmp_path):
    assert job(tmp_path, lambda job: None) == (0, None)
    assert job(tmp_path, lambda job: job.estimator(), _JOB.replace("epochs", "epoks")) == (2, None)
