"""The comparison as plots: only where matplotlib is."""

from __future__ import annotations

import pytest
from algorithm_parts import plots, results

pytestmark = pytest.mark.extras


def run(name):
    curve = [
        results.Point(rows=100 * i, megabytes=1.5 * i, seconds=2.0 * i, loss=3.0 - i, accuracy=0.5) for i in (1, 2)
    ]
    return results.Run(part="digits", name=name, seed=0, rounds=4, settings="inner 0.1", curve=curve)


def test_parts_with_runs_are_drawn(tmp_path):
    assert not plots.plot({"digits": []}, tmp_path / "none.png")
    assert plots.plot({"digits": [run("a"), run("b")], "text": []}, tmp_path / "some.png")
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "none.png").exists()
