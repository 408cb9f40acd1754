"""Structured Streaming: files are scored as they come, each once, with the numbers of a batch job."""

from __future__ import annotations

import pytest
import torch
from pyspark.sql import functions as F
from torch import nn

from sparkdeep import TorchModel
from sparkdeep.data.schema import build_schema
from sparkdeep.spark.session.types import column_types

pytestmark = pytest.mark.jobs

LIMIT_S = 120
COLUMNS = ["prediction", "probability", "rawPrediction"]


def frame_of(spark, first, last):
    pixels = F.array(*(((F.col("id") * (j + 3)) % 17 / 8).cast("double") for j in range(8)))
    return spark.range(first, last).select("id", pixels.alias("pixels"))


@pytest.fixture(scope="module")
def model(spark):
    torch.manual_seed(0)
    types = column_types(frame_of(spark, 0, 1).schema, [])
    schema = build_schema(types=types, feature_cols="pixels", label_cols=None, weight_col=None)
    return TorchModel(
        module=nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).eval(),
        schema=schema.with_seen({"features": ("float32", (8,))}),
        probability_col="probability",
        raw_prediction_col="rawPrediction",
    )


def values(rows):
    return {row["id"]: [row["prediction"], *row["probability"], *row["rawPrediction"]] for row in rows}


def score_what_came(spark, model, folder):
    """One run of the stream, until all files that are there are done; returns its micro-batches."""
    stream = spark.readStream.schema("id bigint, pixels array<double>").option("maxFilesPerTrigger", 1)
    query = (
        model.transform(stream.parquet(str(folder / "in")))
        .select("id", *COLUMNS)
        .writeStream.format("parquet")
        .option("checkpointLocation", str(folder / "state"))
        .trigger(availableNow=True)
        .start(str(folder / "out"))
    )
    try:
        assert query.awaitTermination(LIMIT_S)
        return [progress["numInputRows"] for progress in query.recentProgress if progress["numInputRows"]]
    finally:
        query.stop()


def test_a_stream_from_files_to_files_gives_what_a_batch_job_gives(spark, model, tmp_path):
    for first in (0, 20):
        frame_of(spark, first, first + 20).coalesce(1).write.mode("append").parquet(str(tmp_path / "in"))
    assert score_what_came(spark, model, tmp_path) == [20, 20]
    frame_of(spark, 40, 50).coalesce(1).write.mode("append").parquet(str(tmp_path / "in"))
    assert score_what_came(spark, model, tmp_path) == [10]  # the checkpoint knows what was scored
    written = spark.read.parquet(str(tmp_path / "out")).collect()
    assert sorted(row["id"] for row in written) == list(range(50))
    expected = values(model.transform(frame_of(spark, 0, 50)).collect())
    got = values(written)
    assert got.keys() == expected.keys()
    assert all(got[i] == pytest.approx(expected[i], abs=1e-6) for i in got)
    assert len({tuple(row) for row in expected.values()}) > 10


def test_the_sql_function_scores_a_stream(spark, model, tmp_path):
    frame_of(spark, 0, 10).coalesce(1).write.parquet(str(tmp_path / "in"))
    spark.udf.register("predict", model.udf())
    stream = spark.readStream.schema("id bigint, pixels array<double>").parquet(str(tmp_path / "in"))
    query = (
        stream.selectExpr("id", "predict(pixels).prediction AS prediction")
        .writeStream.format("memory")
        .queryName("scored")
        .trigger(availableNow=True)
        .start()
    )
    try:
        assert query.awaitTermination(LIMIT_S)
    finally:
        query.stop()
    expected = {row["id"]: row["prediction"] for row in model.transform(frame_of(spark, 0, 10)).collect()}
    assert {row["id"]: row["prediction"] for row in spark.table("scored").collect()} == expected
