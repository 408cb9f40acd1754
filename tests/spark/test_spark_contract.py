"""The spelling that users write, end to end on local[2]."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pyspark.ml import Pipeline
from pyspark.ml.feature import VectorAssembler
from pyspark.sql import functions as F
from spark_models import Affine, Net, blob_rows, estimator, same_bits, weights
from torch import nn

from sparkdeep import TorchEstimator, TorchModel
from sparkdeep.errors import ConfigError, ModelLoadError

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def fitted(blobs):
    return TorchEstimator(
        model=Net,
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        feature_cols=["pixels"],
        label_cols="label",
        num_workers=2,
        batch_size=32,
        epochs=5,
        sync_every=10,
        validation=0.1,
        seed=0,
    ).fit(blobs)


def accuracy(model, frame):
    scored = TorchModel.set_prediction(model, "argmax").transform(frame)
    return scored.select(F.avg((F.col("prediction") == F.col("label")).cast("double"))).first()[0]


def test_the_model_learns_and_lies_on_the_cpu(fitted):
    assert isinstance(fitted.model, Net)
    assert {p.device.type for p in fitted.model.parameters()} == {"cpu"}
    assert not fitted.model.training
    assert fitted.history[-1].loss < 0.5 * fitted.history[0].loss


def test_the_history_has_one_record_a_round_that_adds_up(fitted, blobs):
    history = fitted.history
    assert [record["round"] for record in history] == list(range(1, len(history) + 1))
    held_out = blobs.count() * 5 - sum(record["rows"] for record in history)
    assert held_out % 5 == 0
    assert 0 < held_out // 5 < 60
    for record in history:
        assert record["seconds"] >= record["compute_seconds"] > 0
        assert record["exchange_seconds"] >= 0
        assert record["rows"] == sum(part.rows for part in record["replicas"])
        assert [part.replica for part in record["replicas"]] == [0, 1]
    assert history[0]["stage_seconds"] > 0
    assert history[-1]["metrics"]["loss"] < 1.0


@pytest.mark.parametrize(
    ("choice", "kind"),
    [(None, "array<float>"), ("probability", "array<float>"), ("argmax", "bigint"), (lambda o: o[:, 0], "float")],
    ids=["output", "probability", "argmax", "callable"],
)
def test_what_transform_writes_is_chosen(fitted, blobs, choice, kind):
    scored = fitted.set_prediction(choice).transform(blobs)
    assert dict(scored.dtypes)["prediction"] == kind
    row = scored.orderBy("id").first()
    with torch.no_grad():
        output = fitted.model(torch.tensor([row["pixels"]]))[0]
    expected = {
        "argmax": lambda: int(output.argmax()),
        "probability": lambda: output.softmax(0).tolist(),
        None: lambda: output.tolist(),
    }.get(choice if choice is None or isinstance(choice, str) else "", lambda: float(output[0]))()
    assert row["prediction"] == pytest.approx(expected, abs=1e-5)


def test_one_output_a_row_is_a_float(blobs):
    frame = blobs.withColumn("target", F.col("label").cast("float"))
    model = estimator(model=partial(Affine, 8), loss=nn.MSELoss(), label_cols="target").fit(frame)
    assert dict(model.transform(frame).dtypes)["prediction"] == "float"


def test_a_trained_model_predicts_its_own_rows(fitted, blobs):
    assert accuracy(fitted, blobs) > 0.95


def test_save_and_load_keep_every_bit_and_the_history(fitted, blobs, tmp_path):
    fitted.set_prediction(None)
    fitted.save(str(tmp_path / "model"))
    loaded = TorchModel.load(str(tmp_path / "model"))
    assert same_bits(weights(fitted), weights(loaded))
    assert [r.to_dict() for r in loaded.history] == [r.to_dict() for r in fitted.history]
    first, second = (m.transform(blobs).orderBy("id").select("prediction").collect() for m in (fitted, loaded))
    assert first == second


def test_a_model_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelLoadError, match="nowhere"):
        TorchModel.load(str(tmp_path / "nowhere"))


def test_a_warm_start_goes_on_where_the_model_was(fitted, blobs, plain):
    warm = estimator().fit(blobs, warm_start=fitted)
    assert warm.history[0].loss < 0.5 * plain.history[0].loss


def test_a_warm_start_of_another_shape_is_refused_before_ingest(fitted, blobs):
    with pytest.raises(ConfigError, match=r"warm_start[\s\S]*size mismatch[\s\S]*Use the same model and model_args"):
        estimator(model_args={"width": 5}).fit(blobs, warm_start=fitted)


def test_the_estimator_is_a_pipeline_stage(spark):
    rows = [(*point, label) for _, point, label in blob_rows(60)]
    frame = spark.createDataFrame(rows, [*(f"x{i}" for i in range(8)), "label"])
    assembler = VectorAssembler(inputCols=[f"x{i}" for i in range(8)], outputCol="all")
    pipeline = Pipeline(stages=[assembler, estimator(feature_cols="all")]).fit(frame)
    assert dict(pipeline.transform(frame).dtypes)["prediction"] == "array<float>"


def test_the_callers_module_is_left_as_it_was(blobs):
    torch.manual_seed(3)
    own = Net()
    before = {k: v.clone() for k, v in own.state_dict().items()}
    model = estimator(model=own).fit(blobs)
    assert all(torch.equal(before[k], v) for k, v in own.state_dict().items())
    assert not same_bits(before, weights(model))
