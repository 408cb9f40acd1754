"""The jobs as a person runs them: spark-submit, exit codes, what lies in the output folder afterwards.

spark-submit trains, and tests/jobs/test_pipeline.py has it hand on an exit code; the other scripts run in this process,
from their first line to the code that they end with, on the session that is there.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyspark
import pytest
from paths import ROOT

from sparkdeep.spark.job.run import Job

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(1100)]

SUBMIT = str(Path(pyspark.__file__).parent / "bin" / "spark-submit")


def submit(job, *arguments, config="conf/digits.toml"):
    environment = {
        **os.environ,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_CONF_DIR": str(ROOT / "conf"),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [SUBMIT, "--conf", "spark.driver.host=127.0.0.1", f"jobs/{job}.py", config, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1000,
    )  # fmt: skip


@pytest.fixture
def ran(spark, monkeypatch, capfd):
    """Runs a script as `python jobs/NAME.py ARGUMENTS` does, but for the session, which stays."""

    def run(job, *arguments, config="conf/digits.toml"):
        path = ROOT / f"jobs/{job}.py"
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [str(path), config, *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        seen = capfd.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=seen.out, stderr=seen.err)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Job, "stop", lambda self: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits")
    return folder, submit("train", "--set", f'output.dir="{folder}"', "--set", "fit.epochs=4")


def test_training_leaves_a_model_records_predictions_and_a_result(trained):
    folder, done = trained
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["exit_code"], result["resumable"]) == ("done", 0, False)
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [r["round"] for r in records] == list(range(1, len(records) + 1))
    assert (folder / "model" / "model.safetensors").is_file()
    assert list((folder / "predictions").glob("*.parquet"))
    report = (folder / "report.html").read_text()
    assert f"<dt>rounds</dt><dd>{len(records)}</dd>" in report
    assert "<dt>accuracy</dt>" in report
    assert "CrossEntropyLoss" in report
    line = next(line for line in done.stdout.splitlines() if line.startswith("accuracy "))
    assert float(line.split()[1]) > 0.9


def test_evaluate_and_predict_read_that_model(trained, ran):
    folder, _ = trained
    evaluated = ran("evaluate", "--set", f'output.dir="{folder}"')
    assert evaluated.returncode == 0, evaluated.stderr[-4000:]
    shown = next(line for line in evaluated.stdout.splitlines() if line.startswith("accuracy "))
    assert float(shown.split()[1]) > 0.9
    predicted = ran("predict", "--set", f'output.dir="{folder}"')
    assert predicted.returncode == 0, predicted.stderr[-4000:]


@pytest.mark.parametrize(
    ("override", "code", "status", "words"),
    [
        ("fit.batch_sise=3", 2, "wrong configuration", "batch_size"),
        ('fit.feature_cols=["pixel"]', 2, "wrong configuration", "pixels"),
        ("optimizer.args={lr=1e30}", 1, "failed", "NaN"),
    ],
)
def test_what_goes_wrong_has_an_exit_code_and_a_reason(tmp_path, ran, override, code, status, words):
    pytest.importorskip("sklearn")
    done = ran("train", "--set", f'output.dir="{tmp_path}"', "--set", "fit.epochs=1", "--set", override)
    assert done.returncode == code, done.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == (status, code)
    assert words in json.dumps(result)
    # A run that began has its report; one whose estimator could not even be made has none.
    assert (tmp_path / "report.html").exists() == ("batch_sise" not in override)
