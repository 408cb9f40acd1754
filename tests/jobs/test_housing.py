"""The housing example as a person runs it: on the houses where they are, else on scikit-learn's table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyspark
import pytest
from paths import ROOT

pytestmark = [pytest.mark.jobs, pytest.mark.slow_job, pytest.mark.timeout(1100)]

SUBMIT = str(Path(pyspark.__file__).parent / "bin" / "spark-submit")
DATA = Path(os.environ.get("SPARKDEEP_DATA", ROOT.parent / "shared" / "data"))


def run(folder, *arguments):
    environment = {
        **os.environ,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_CONF_DIR": str(ROOT / "conf"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "jobs")]),
    }
    done = subprocess.run(
        [SUBMIT, "--master", "local[2]", "--conf", "spark.ui.enabled=false", "--conf", "spark.driver.host=127.0.0.1",
         "jobs/housing.py", "--output", str(folder), *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    result = json.loads((folder / "result.json").read_text())
    assert f"rmse network: {result['network']:,.1f} {result['unit']}" in done.stdout
    assert result["same after loading"] is True
    assert (folder / "search" / "bestModel" / "metadata").is_dir()
    return result


# Both go the same way through the same job, for minutes: one of them is enough.
HOUSES = (DATA / "housing.csv").exists()


@pytest.mark.skipif(HOUSES, reason="the houses are there")
def test_patients_through_the_whole_pipeline(tmp_path):
    pytest.importorskip("sklearn")
    result = run(tmp_path, "--epochs", "20")
    best = min(one["rmse"] for one in result["cross-validation"])
    worst = max(one["rmse"] for one in result["cross-validation"])
    assert best < worst
    # 77 points is what the mean alone would be off; few rows leave little between a line and a network.
    assert result["network"] < 65
    assert result["network"] < 1.15 * result["linear regression"]


@pytest.mark.skipif(not HOUSES, reason="housing.csv is not in ../shared/data or SPARKDEEP_DATA")
def test_houses_below_52_000_dollars(tmp_path):
    result = run(tmp_path, "--data", str(DATA))
    assert result["network"] < 52_000
    assert result["network"] < result["plain perceptron"] < result["linear regression"]
    assert 60_000 < result["linear regression"] < 72_000
