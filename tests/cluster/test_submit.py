"""The README's job on two hosts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pyspark
import pytest
from cluster_fixtures import BRIEF, environment
from paths import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1100)]


def test_spark_submit_reaches_the_same_accuracy_on_a_cluster(cluster, tmp_path):
    pytest.importorskip("sklearn")
    cluster.end_session()
    command = [
        str(Path(pyspark.__file__).parent / "bin" / "spark-submit"),
        "--master", cluster.url,
        "--conf", "spark.driver.host=127.0.0.1",
        "--conf", "spark.executor.memory=512m",
        "--conf", "spark.executor.cores=1",
        "--conf", "spark.cores.max=2",
        "--conf", "spark.ui.enabled=false",
        "--conf", f"spark.driver.extraJavaOptions={BRIEF}",
        "--conf", f"spark.executor.extraJavaOptions={BRIEF}",
        "jobs/train.py", "conf/digits.toml", "--set", f'output.dir="{tmp_path}"',
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment(SPARK_LOCAL_IP="127.0.0.1"), capture_output=True, text=True, timeout=1000
    )
    assert done.returncode == 0, done.stderr[-4000:]
    accuracy = [line for line in done.stdout.splitlines() if line.startswith("accuracy ")]
    assert float(accuracy[0].split()[1]) >= 0.97
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "done"
    rounds = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert all(len(record["replicas"]) == 2 for record in rounds)
