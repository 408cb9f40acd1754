from __future__ import annotations

import json

import pytest

from sparkdeep.errors import ConfigError, DataError
from sparkdeep.spark.job.steps import Step, Steps
from sparkdeep.storage.opening import open_store


class Pipeline:
    """Three steps in a row that count their runs."""

    def __init__(self, folder, *, settings=None, fails=None):
        self.ran = []
        self.fails = fails
        given = {"rows": 1, "train": 2, "score": 3} | (settings or {})
        steps = [
            Step(name="rows", work=lambda: self.work("rows"), settings=given["rows"]),
            Step(name="train", work=lambda: self.work("train"), needs=("rows",), settings=given["train"]),
            Step(name="score", work=lambda: self.work("score"), needs=("train",), settings=given["score"]),
        ]
        self.steps = Steps(steps, open_store(str(folder)))

    def work(self, name):
        self.ran.append(name)
        if name == self.fails:
            raise RuntimeError("broke off")
        return {"did": name}

    def all(self, **options):
        return [self.steps.run(name, **options) for name in self.steps.names]


def test_each_step_runs_once_and_a_rerun_does_nothing(tmp_path):
    first = Pipeline(tmp_path)
    assert [report.done_before for report in first.all()] == [False, False, False]
    again = Pipeline(tmp_path)
    reports = again.all()
    assert [report.done_before for report in reports] == [True, True, True]
    assert [report.result for report in reports] == [{"did": name} for name in ("rows", "train", "score")]
    assert again.ran == []


def test_after_a_failure_it_goes_on_where_it_broke_off(tmp_path):
    broken = Pipeline(tmp_path, fails="train")
    with pytest.raises(RuntimeError, match="broke off"):
        broken.all()
    assert broken.ran == ["rows", "train"]
    again = Pipeline(tmp_path)
    again.all()
    assert again.ran == ["train", "score"]


def test_changed_settings_repeat_the_steps_that_depend_on_them_and_no_others(tmp_path):
    Pipeline(tmp_path).all()
    changed = Pipeline(tmp_path, settings={"train": 20})
    changed.all()
    assert changed.ran == ["train", "score"]
    back = Pipeline(tmp_path)
    back.all()
    assert back.ran == ["train", "score"]  # the markers were replaced: an old result is not taken for today's


def test_a_step_out_of_order_names_the_one_to_run_first_and_runs_nothing(tmp_path):
    pipeline = Pipeline(tmp_path)
    with pytest.raises(ConfigError, match=r"step 'score' needs step 'train', which has not been done.*--step train"):
        pipeline.steps.run("score")
    pipeline.all()
    stale = Pipeline(tmp_path, settings={"rows": 10})
    with pytest.raises(ConfigError, match=r"needs step 'train', which was done with other settings or inputs"):
        stale.steps.run("score")
    assert stale.ran == []


def test_a_step_that_is_repeated_and_breaks_off_counts_as_not_done(tmp_path):
    Pipeline(tmp_path).all()
    broken = Pipeline(tmp_path, fails="train")
    with pytest.raises(RuntimeError):
        broken.steps.run("train", again=True)
    with pytest.raises(ConfigError, match="has not been done"):
        Pipeline(tmp_path).steps.run("score")


def test_again_repeats_what_is_done(tmp_path):
    Pipeline(tmp_path).all()
    again = Pipeline(tmp_path)
    assert not again.steps.run("rows", again=True).done_before
    assert again.ran == ["rows"]


@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"fingerprint": "x"}', b"\xff"])
def test_a_damaged_marker_is_named(tmp_path, damage):
    Pipeline(tmp_path).all()
    (tmp_path / "steps/rows.json").write_bytes(damage)
    with pytest.raises(DataError, match=r"steps/rows.json in .* remove it"):
        Pipeline(tmp_path).steps.run("rows")


def test_markers_say_what_was_done_and_when(tmp_path):
    Pipeline(tmp_path).all()
    marker = json.loads((tmp_path / "steps/train.json").read_text())
    assert marker["step"] == "train"
    assert marker["result"] == {"did": "train"}
    assert marker["finished"].endswith("+00:00")
