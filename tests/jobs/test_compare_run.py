"""The comparison as a person runs it, in small: what it writes, not who wins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from paths import ROOT

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(1100)]


def test_two_algorithms_on_digits_become_lines_a_table_and_a_plot(tmp_path):
    environment = {
        **os.environ,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_CONF_DIR": str(ROOT / "conf"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "benchmarks/algorithms.py", "digits", "--only", "averaging,diloco", "--seeds", "1", "--epochs", "2",
         "--out", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "digits.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["averaging", "diloco"]
    for line in lines:
        # 1438 rows in 4 shards of about 360, batches of 16: 23 steps or so, rounds of 10, two epochs.
        assert line["rounds"] in (6, 8)
        assert [point["rows"] for point in line["curve"]] == [1436, 2872]
        assert line["curve"][-1]["loss"] < line["curve"][0]["loss"]
    assert lines[0]["curve"][-1]["megabytes"] == pytest.approx(lines[1]["curve"][-1]["megabytes"], rel=0.05)
    text = (tmp_path / "compare.md").read_text()
    assert "## Digits" in text
    assert all(f"| {name} |" in text for name in ("averaging", "diloco"))
    assert (tmp_path / "compare.png").exists() == (find_spec("matplotlib") is not None)
