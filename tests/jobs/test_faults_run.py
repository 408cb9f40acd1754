"""The faults job as a person runs it, its cheapest part: what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(1100)]


def ran(*arguments):
    return subprocess.run(
        [sys.executable, "benchmarks/faults.py", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=1000,
    )  # fmt: skip


def test_a_part_writes_a_short_table_a_whole_one_and_json(tmp_path):
    done = ran("--only", "schedules", "--examples", "5", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    content = json.loads((tmp_path / "faults.json").read_text())
    (part,) = content["parts"]
    assert (part["name"], part["failed"]) == ("schedules", False)
    tested = [line for line in part["result"]["lines"] if line["rows"] == [41]]
    assert [line["outcome"] for line in tested] == ["passed"]
    assert {"cpu", "commit", "torch", "date"} <= content["about"].keys()
    short = (tmp_path / "readme.md").read_text()
    assert "| 5 random lists of up to 4 faults on the twin | every run equals the undisturbed one |" in short
    assert short in (tmp_path / "faults.md").read_text()


def test_what_cannot_be_meant_is_refused(tmp_path):
    assert "unknown: ['weather']" in ran("--only", "weather", "--out", str(tmp_path)).stderr
    assert "--rounds: tens" in ran("--rounds", "25", "--out", str(tmp_path)).stderr
