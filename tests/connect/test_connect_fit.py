"""The estimator and its model on Spark Connect, where there is no SparkContext, no broadcast and no count of slots."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transport_contract import *  # noqa: F403 (the contract's tests, collected here with this session)
from transport_models import Wide, estimator, same_bits

from sparkdeep import TorchEstimator, TorchModel
from sparkdeep.errors import ConfigError, PreflightError
from sparkdeep.spark.session.parcels import artifact_bytes

pytestmark = pytest.mark.connect

OPTIONS = {"epochs": 2, "validation": 0.2, "validate_every": 1}

_CLASSIC = """
import sys
from pyspark.sql import SparkSession
from safetensors.torch import save_file
from test_connect_fit import OPTIONS
from transport_models import blob_rows, estimator

spark = (
    SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    .config("spark.driver.host", "127.0.0.1").config("spark.driver.bindAddress", "127.0.0.1")
    .config("spark.sql.shuffle.partitions", "2").getOrCreate()
)
rows = spark.createDataFrame(blob_rows(200), "id int, pixels array<double>, label bigint")
model = estimator(**OPTIONS, transport="socket").fit(rows)
save_file(model.model.state_dict(), sys.argv[1])
"""


def test_not_a_bit_differs_from_a_classic_session(blobs, tmp_path):
    # The two kinds of session cannot live in one process.
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("SPARK_REMOTE", "SPARK_LOCAL_REMOTE", "SPARK_CONNECT"))
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment["PYTHONPATH"]])
    path = tmp_path / "classic.safetensors"
    classic = subprocess.Popen(
        [sys.executable, "-c", _CLASSIC, str(path)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    model = estimator(**OPTIONS, transport="auto").fit(blobs)
    stored = estimator(**OPTIONS, exchange_dir=str(tmp_path / "exchange")).fit(blobs)
    output, _ = classic.communicate(timeout=120)
    assert classic.returncode == 0, output.decode()[-3000:]
    expected = load_file(path)
    for found in (model, stored):
        state = found.model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)


def test_a_model_scores_as_its_module_does_and_is_saved_and_loaded(spark, blobs, tmp_path):
    model = estimator(prediction="argmax").fit(blobs)
    rows = model.transform(blobs).select("pixels", "prediction").collect()
    with torch.no_grad():
        expected = model.model(torch.tensor([row.pixels for row in rows], dtype=torch.float32)).argmax(1)
    assert np.array_equal([row.prediction for row in rows], expected.numpy())
    model.save(str(tmp_path / "model"))
    again = TorchModel.load(str(tmp_path / "model"), allow_modules=["transport_models"])
    assert same_bits(model, again)
    assert again.transform(blobs).select("prediction").collect() == [(row.prediction,) for row in rows]
    with pytest.raises(ConfigError, match="no JVM at hand"):
        model.save("s3a://bucket/model")


def test_an_estimator_is_saved_over_another(spark, tmp_path):
    path = str(tmp_path / "estimator")
    estimator(epochs=3).save(path)
    estimator(epochs=5).write().overwrite().save(path)
    again = TorchEstimator.load(path, allow_modules=["transport_models"])
    assert (again.getEpochs(), again.getOrDefault("model")) == (5, estimator().getOrDefault("model"))


@pytest.mark.fault(rows=[31, 38], phases="PF")
def test_parameters_between_closure_and_limit_go_as_artifacts_and_are_counted(spark, blobs, tmp_path):
    options = {"model": Wide, "model_args": {"megabytes": 6}, "optimizer": torch.optim.SGD, "learning_rate": 0.1}
    before = artifact_bytes(spark)
    model = estimator(**options, sync_every="epoch").fit(blobs)
    sent = artifact_bytes(spark) - before
    assert 6e6 < sent < 7e6  # one round, no validation
    rows = model.transform(blobs.limit(20)).select("pixels", "prediction").collect()
    with torch.no_grad():
        expected = model.model(torch.tensor([row.pixels for row in rows], dtype=torch.float32))
    np.testing.assert_allclose([row.prediction for row in rows], expected.numpy(), rtol=1e-5)
    assert artifact_bytes(spark) - before == pytest.approx(2 * sent, rel=0.01)
    with pytest.raises(PreflightError, match=r"6\.0 MB of parameters a round, 40 rounds.*exchange_dir"):
        estimator(**options, sync_every="epoch", epochs=40).fit(blobs)
    stored = estimator(**options, sync_every="epoch", exchange_dir=str(tmp_path / "exchange")).fit(blobs)
    assert same_bits(model, stored)
    assert artifact_bytes(spark) - before == pytest.approx(2 * sent, rel=0.01)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"transport": "socket"}, "cannot dial"),
        ({"exchange_dir": "relative"}, "absolute path or a URI"),
        ({"cpus_per_worker": 2}, "local master"),
    ],
)
def test_what_cannot_be_there_is_refused_by_name(blobs, options, word):
    with pytest.raises((ConfigError, PreflightError), match=word):
        estimator(**options).fit(blobs)


def test_too_few_slots_are_found_by_a_probe(blobs):
    with pytest.raises(PreflightError, match=r"num_workers=3.*within 5 s"):
        estimator(num_workers=3, open_timeout_s=5.0).fit(blobs)


def test_a_pipeline_of_sparks_own_stages_and_ours_is_fitted_there(spark, blobs):
    from pyspark.ml import Pipeline
    from pyspark.ml.feature import VectorAssembler

    columns = [f"x{i}" for i in range(8)]
    flat = blobs.select("label", *[blobs.pixels[i].alias(name) for i, name in enumerate(columns)])
    assembler = VectorAssembler(inputCols=columns, outputCol="pixels")
    pipeline = Pipeline(stages=[assembler, estimator(prediction="argmax", transport="auto")])
    model = pipeline.fit(flat)
    rows = model.transform(flat).select("pixels", "prediction").collect()
    with torch.no_grad():
        pixels = torch.tensor(np.array([row.pixels.toArray() for row in rows]), dtype=torch.float32)
        expected = model.stages[-1].model(pixels).argmax(1)
    assert len(rows) == 200
    assert [row.prediction for row in rows] == expected.tolist()
