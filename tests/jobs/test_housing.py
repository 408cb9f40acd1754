"""The housing example as a person runs it: on the houses where they are, else on scikit-learn's table."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT
from pyspark.sql import SparkSession

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(1100)]

DATA = Path(os.environ.get("SPARKDEEP_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture
def run(spark, monkeypatch, capsys, tmp_path):
    """The whole script, from its command line to its exit code, on the session that is there and stays."""

    def script(*arguments):
        path = ROOT / "jobs/housing.py"
        monkeypatch.setattr(sys, "argv", [str(path), "--output", str(tmp_path), *arguments])
        monkeypatch.setattr(SparkSession, "stop", lambda self: None)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        printed = capsys.readouterr().out
        print(printed)
        assert ended.value.code == 0
        result = json.loads((tmp_path / "result.json").read_text())
        assert f"rmse network: {result['network']:,.1f} {result['unit']}" in printed
        assert result["same after loading"] is True
        assert (tmp_path / "search" / "bestModel" / "metadata").is_dir()
        return result

    before = torch.get_num_threads()
    yield script
    torch.set_num_threads(before)


# Both go the same way through the same job, for minutes: one of them is enough.
HOUSES = (DATA / "housing.csv").exists()


@pytest.mark.skipif(HOUSES, reason="the houses are there")
def test_patients_through_the_whole_pipeline(run):
    pytest.importorskip("sklearn")
    result = run("--epochs", "20")
    best = min(one["rmse"] for one in result["cross-validation"])
    worst = max(one["rmse"] for one in result["cross-validation"])
    assert best < worst
    # 77 points is what the mean alone would be off; few rows leave little between a line and a network.
    assert result["network"] < 65
    assert result["network"] < 1.15 * result["linear regression"]


@pytest.mark.skipif(not HOUSES, reason="housing.csv is not in ../shared/data or SPARKDEEP_DATA")
def test_houses_below_52_000_dollars(run):
    result = run("--data", str(DATA))
    assert result["network"] < 52_000
    assert result["network"] < result["plain perceptron"] < result["linear regression"]
    assert 60_000 < result["linear regression"] < 72_000
