"""`transform` gives what the model gives, without a job of its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pyspark.sql import functions as F
from spark_models import CountsBuilds, Net, blob_rows, estimator, weights

from sparkdeep import TorchModel

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def model(plain):
    return plain


def predictions(frame):
    return torch.tensor([row["prediction"] for row in frame.collect()])


def test_a_prediction_is_the_local_models_bit_for_bit_on_the_same_batches(spark, model):
    points = [row[1] for row in blob_rows(150)]
    frame = spark.createDataFrame([(p,) for p in points], "pixels array<double>").coalesce(1)
    features = torch.tensor(points, dtype=torch.float64).float()
    for size in (32, 7):  # a changed batch size counts at once
        model.setBatchSize(size)
        got = predictions(model.transform(frame))
        with torch.inference_mode():
            expected = torch.cat([model.model(part) for part in features.split(size)])
        assert torch.equal(got, expected)
    with torch.inference_mode():
        whole = model.model(features)
    assert torch.allclose(got, whole, atol=1e-6)


def test_a_model_that_was_changed_on_the_driver_predicts_as_changed(model, blobs):
    before = weights(model)
    first = predictions(model.transform(blobs))
    try:
        with torch.no_grad():
            model.model.layers[2].bias.add_(1.0)
        assert torch.allclose(predictions(model.transform(blobs)), first + 1.0, atol=1e-5)
    finally:
        model.model.load_state_dict(before)


def test_partitioning_changes_a_prediction_by_less_than_a_millionth(model, blobs):
    one = {row["id"]: row["prediction"] for row in model.transform(blobs.coalesce(1)).collect()}
    many = {row["id"]: row["prediction"] for row in model.transform(blobs.repartition(7)).collect()}
    assert one.keys() == many.keys()
    assert max(abs(a - b) for k in one for a, b in zip(one[k], many[k], strict=True)) < 1e-6


def test_rows_that_a_filter_removed_are_no_trouble(model, blobs):
    assert model.transform(blobs.where("id < 0")).collect() == []
    assert model.transform(blobs.repartition(8).where("id = 3")).count() == 1


def test_no_job_runs_to_know_the_schema(spark, model):
    def explode(value):
        raise AssertionError("a row was asked for")

    pixels = F.udf(explode, "array<double>")(F.col("id"))
    tracker = spark.sparkContext._jsc.sc().statusStore()
    before = tracker.jobsList(None).size()
    scored = model.transform(spark.range(5).withColumn("pixels", pixels))
    assert dict(scored.dtypes)["prediction"] == "array<float>"
    assert tracker.jobsList(None).size() == before
    with pytest.raises(Exception, match="a row was asked for"):
        scored.collect()


def test_a_worker_builds_the_model_once_however_many_tasks_it_runs(spark, blobs, tmp_path):
    model = estimator(model=partial(CountsBuilds, tmp_path / "builds")).fit(blobs)
    (tmp_path / "builds").unlink()
    scored = model.transform(blobs.repartition(6))
    assert scored.count() == 200
    scored.agg(F.sum(F.col("prediction")[0])).collect()
    scored.agg(F.sum(F.col("prediction")[1])).collect()
    built = (tmp_path / "builds").read_text().split()
    assert 1 <= len(built) <= 2  # two workers at most on local[2]
    assert len(set(built)) == len(built)


def test_a_plain_prediction_can_be_written_by_a_model_that_was_loaded(model, blobs, tmp_path):
    model.save(str(tmp_path / "model"))
    loaded = TorchModel.load(str(tmp_path / "model"), model=Net, prediction="argmax")
    assert dict(loaded.transform(blobs).dtypes)["prediction"] == "bigint"
