"""The benchmark's tables, plots and counters: known values in, known text out. No JVM."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import types

import numpy as np
import pytest
import speed as benchmark
import torch
from measuring import plots, table
from measuring.rows import interleaved, over, row
from speed_parts import images


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.25], "0.25"),
        ([3.0, 1.0, 2.0], "2 (1 to 3)"),
        ([123456.0, 101.5, 99999.9], "100,000 (102 to 123,456)"),
        ([0.0012345, 0.0011111], "0.00117 (0.00111 to 0.00123)"),
    ],
)
def test_the_median_stands_before_the_least_and_the_most(values, text):
    assert table.spread(values) == text


def test_a_section_becomes_a_table_with_a_line_for_every_ratio():
    ours = row("ours", "s", [1.0, 2.0, 6.0], ratios={"theirs": [0.5, 1.0, 2.0], "ceiling": [4.0, 4.0, 8.0]})
    section = {"title": "Speed", "rows": [ours, row("theirs", "s", [2.0])], "notes": ["Quiet."]}
    assert table.section_table(section).splitlines() == [
        "## Speed",
        "",
        "| what | unit | median (least to most) | against | ratio |",
        "|---|---|---|---|---|",
        "| ours | s | 2 (1 to 6) | theirs | 1 (0.5 to 2) |",
        "|  |  |  | ceiling | 4 (4 to 8) |",
        "| theirs | s | 2 |  |  |",
        "",
        "Quiet.",
    ]


def test_every_other_pair_runs_backwards_and_values_stay_with_their_names():
    calls = []

    def measure(name, step):
        calls.append(name)
        return len(calls) * step

    values = interleaved({"a": lambda: measure("a", 1), "b": lambda: measure("b", 10)}, 3)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert values == {"a": [1, 4, 5], "b": [20, 30, 60]}
    assert over(values["b"], values["a"]) == [20.0, 7.5, 12.0]


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert "pip install 'sparkdeep[benchmark]'" in plots.can_plot()


def test_images_are_whole_squares_in_0_to_1_and_every_one_is_there_once():
    pytest.importorskip("sklearn")
    found = images.load_images(None)
    assert found.side == 8
    assert found.pixels.shape == (1797, 64)
    assert (found.pixels.min(), found.pixels.max()) == (0.0, 1.0)
    assert found.train_rows == 1436
    from sklearn.datasets import load_digits

    whole = load_digits()
    assert found.labels.sum() == whole.target.sum()
    assert math.isclose(float(found.pixels.sum(dtype="float64")), whole.data.sum() / 16)


def test_the_convnet_takes_both_sides_and_accuracy_is_a_share():
    for side in (8, 28):
        assert images.Convnet(side)(torch.zeros(3, side * side)).shape == (3, 10)
    output = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert float(images.accuracy(output, torch.tensor([0, 1, 1, 0]))) == 0.75


def test_a_section_is_given_what_it_asks_for_and_one_that_fails_leaves_the_others_alone(monkeypatch, tmp_path, capsys):
    asked = {}

    def good(*, pairs, quick):
        asked.update(pairs=pairs, quick=quick)
        return {"title": "Good", "rows": [row("it", "s", [1.0])], "notes": []}

    def bad(spark):
        raise RuntimeError(f"{spark} is no session")

    for name, measure in (("good", good), ("bad", bad)):
        module = types.ModuleType(f"speed_parts.{name}")
        module.measure, module.__spec__ = measure, importlib.util.spec_from_loader(f"speed_parts.{name}", None)
        monkeypatch.setitem(sys.modules, f"speed_parts.{name}", module)
    monkeypatch.setattr(benchmark, "SECTIONS", ("bad", "good", "absent"))
    monkeypatch.setattr(benchmark, "spark_session", lambda: "this")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--quick", "--pairs", "2", "--output", str(tmp_path)])
    assert benchmark.main() == 1
    assert asked == {"pairs": 2, "quick": True}
    content = json.loads((tmp_path / "benchmark.json").read_text())
    failed, measured, absent = content["sections"]
    assert (failed["name"], failed["failed"]) == ("bad", True)
    assert failed["notes"] == ["FAILED: RuntimeError: this is no session"]
    assert (measured["rows"][0]["values"], measured["failed"]) == ([1.0], False)
    assert absent["failed"]  # a section that cannot be found is no section that was measured
    assert absent["notes"] == ["FAILED: ModuleNotFoundError: No module named 'speed_parts.absent'"]
    assert content["about"].keys() >= {"date", "cpu", "cores", "commit", "torch", "pyspark"}
    text = (tmp_path / "benchmark.md").read_text()
    assert text.index("RuntimeError: this is no session") < text.index("| it | s | 1 |")
    capsys.readouterr()


def test_unknown_sections_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--only", "memory,speed"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "unknown sections ['speed']; known: throughput, exchange" in capsys.readouterr().err


def test_the_bound_of_a_median_is_an_order_statistic():
    from against import compared, lower_bound

    # P(fewer than 7 heads of 21 coins) = 0.039, and fewer than 8: 0.095: the seventh smallest.
    assert lower_bound(list(range(21))) == 6
    assert lower_bound(list(range(5))) == 0
    with pytest.raises(ValueError, match="4 pairs say nothing"):
        lower_bound([1.0, 1.0, 1.0, 1.0])
    assert compared({"a": [1.0, 0.5, 1.0, 2.0, 1.0]})[2] == "| a | 1.000 | 0.500 | 0.50 to 2.00 |"


def test_the_bound_of_a_median_holds_as_often_as_it_says():
    from against import lower_bound

    generator = np.random.default_rng(0)
    above = [lower_bound(generator.lognormal(size=21)) <= 1.0 for _ in range(2000)]
    assert 0.945 <= np.mean(above) <= 0.975
