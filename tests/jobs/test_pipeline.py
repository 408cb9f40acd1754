"""jobs/pipeline.py on scikit-learn's table: the whole, a rerun, a failure in the middle, the gate, the order."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pipeline
import pyspark
import pytest
from paths import ROOT
from pyspark.ml import PipelineModel

from sparkdeep import ConfigError, SparkdeepError
from sparkdeep.spark.job.config import load_config
from sparkdeep.spark.job.run import Job
from sparkdeep.spark.job.steps import Steps

pytestmark = pytest.mark.jobs

CONFIG = ROOT / "conf/pipeline.toml"


def run(spark, folder, *overrides, step=None, again=False):
    """As the command does, in this session; returns what each step left."""
    config = load_config(CONFIG, [f"output.dir='{folder}'", "fit.progress=false", *overrides])
    job = Job(config=config, options=argparse.Namespace(step=step, again=again))
    job._session = spark
    pipeline.pipeline(job)
    return job.result["steps"]


@pytest.fixture(scope="module")
def done(spark, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    return folder, run(spark, folder)


def test_the_whole_pipeline_passes_its_gate_and_publishes(spark, done):
    folder, results = done
    assert list(results) == ["extract", "features", "train", "evaluate", "score", "publish"]
    assert results["extract"]["train"] + results["extract"]["test"] == 442
    assert results["evaluate"]["rmse"] < 65  # always saying the mean gives about 77
    assert results["score"]["rows"] == results["extract"]["test"]
    latest = json.loads((folder / "published/latest.json").read_text())
    assert latest["version"] == results["publish"]["version"]
    assert latest["scores"] == results["evaluate"]
    # The published model takes rows as they came from the source.
    rows = spark.read.parquet(f"file://{folder}/extracted/test")
    published = PipelineModel.load(f"file://{folder}/published/{latest['version']}")
    scores = spark.read.parquet(f"file://{folder}/scores")
    columns = ["age", "bp", "s1", "s2", "prediction"]
    assert sorted(published.transform(rows).select(columns).collect()) == sorted(scores.select(columns).collect())


def test_a_rerun_does_nothing_again(spark, done, capsys):
    folder, results = done
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert run(spark, folder) == results
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    assert capsys.readouterr().out.count("done before") == 6


def test_a_gate_that_is_not_passed_publishes_nothing_and_names_the_numbers(spark, done):
    folder, _ = done
    latest = (folder / "published/latest.json").read_text()
    with pytest.raises(
        SparkdeepError, match=r"gate is not passed: rmse is [\d.]+ on the test rows, and must be at most 1\b"
    ):
        run(spark, folder, "pipeline.gate.rmse=1.0")
    assert (folder / "published/latest.json").read_text() == latest
    with pytest.raises(ConfigError, match=r"'publish' needs step 'evaluate', which has not been done"):
        run(spark, folder, "pipeline.gate.rmse=1.0", step="publish")
    # With the old gate again: evaluated anew, and nothing before it.
    names = []
    original = Steps.run

    def noted(self, name, **options):
        report = original(self, name, **options)
        names.append((name, report.done_before))
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "run", noted)
        run(spark, folder)
    assert [name for name, before in names if not before] == ["evaluate"]


def test_after_a_failure_in_training_it_goes_on_from_the_checkpoint(spark, done, tmp_path, monkeypatch):
    stopped = []

    def breaks_off(record):
        stopped.append(record.round)
        if record.round == 12:
            raise RuntimeError("power cut")

    original = Job.estimator

    def watched(self):
        estimator = original(self)
        estimator.setCallbacks([*estimator.getCallbacks(), breaks_off])
        return estimator

    for name in ("extracted", "features"):
        shutil.copytree(done[0] / name, tmp_path / name)
    (tmp_path / "steps").mkdir()
    for step in ("extract", "features"):
        shutil.copy(done[0] / f"steps/{step}.json", tmp_path / "steps")
    with monkeypatch.context() as patch:
        patch.setattr(Job, "estimator", watched)
        with pytest.raises(RuntimeError, match="power cut"):
            run(spark, tmp_path)
    assert stopped == list(range(1, 13))
    assert not (tmp_path / "steps/train.json").exists()
    rounds = []
    with monkeypatch.context() as patch:
        patch.setattr(
            Job, "estimator", lambda self: original(self).setCallbacks([lambda record: rounds.append(record.round)])
        )
        results = run(spark, tmp_path)
    assert rounds
    assert rounds[0] > 10  # checkpoint_every is 10
    assert rounds[-1] == results["train"]["rounds"]


def test_a_step_out_of_order_is_a_wrong_configuration_with_an_exit_code(tmp_path):
    submit = Path(pyspark.__file__).parent / "bin/spark-submit"
    done = subprocess.run(
        [submit, "--conf", "spark.driver.host=127.0.0.1", "jobs/pipeline.py", str(CONFIG), "--step", "train", "--set", f"output.dir='{tmp_path}'"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYSPARK_PYTHON": sys.executable, "SPARK_CONF_DIR": str(ROOT / "conf"), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert (
        "step 'train' needs step 'features', which has not been done" in done.stdout
    )  # spark-submit sends both to one stream
    result = json.loads((tmp_path / "pipeline.json").read_text())
    assert (result["status"], result["exit_code"]) == ("wrong configuration", 2)
