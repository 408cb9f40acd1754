"""From DataFrame columns to the tensors a model sees, and which rows go where."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from functools import partial

import numpy as np
import pytest
import torch
from pyspark.ml.linalg import Vectors, VectorUDT
from pyspark.sql import functions as F
from pyspark.sql import types as T
from spark_models import (
    Affine,
    LabelCount,
    Recorder,
    TwoTowers,
    blob_rows,
    distance_of_means,
    estimator,
    label_share,
    regression,
    weights,
)
from torch import nn

from sparkdeep.data.schema import build_schema
from sparkdeep.rounds.fit import new_run_id
from sparkdeep.spark.ingest.ingest import dealt, read_manifests, shards_of
from sparkdeep.spark.session.jobs import SparkJob
from sparkdeep.spark.session.types import column_types
from sparkdeep.spark.tasks.cleaning import clean_executors

pytestmark = pytest.mark.spark


def ingest(frame, *, seed=0, num_workers=2, validation=None, features=("pixels",), labels="label"):
    """Only the ingest: what the manifests say."""
    schema = build_schema(
        types=column_types(frame.schema, [*features, labels]),
        feature_cols=list(features),
        label_cols=labels,
        weight_col=None,
    )
    rows = dealt(frame, schema, validation=validation, num_workers=num_workers, seed=seed)
    run = new_run_id()
    shards = shards_of(rows, schema, run=run, decode=None, shard_dir=None, profile=None)
    job = SparkJob(frame.sparkSession, shards, tag="sparkdeep-test-ingest", description="test")
    try:
        return read_manifests(job.result(60.0, "ingest"), schema, num_workers)
    finally:
        shards.unpersist()
        clean_executors(frame.sparkSession, run, None)


def digests(ingested):
    return [fact.digest for fact in ingested.facts]


def counted(ingested, split):
    return [fact.rows[split] for fact in ingested.facts]


@pytest.fixture(scope="module")
def mixed(spark):
    """Eight rows with a column of every kind."""
    rows = [
        (
            i,
            float(i),
            Decimal(i) / 4,
            i % 2 == 0,
            [float(i), 1.0],
            [[i, i], [i, i]],
            bytes([i, 1, 2, 3]),
            [float(i)] * (i % 3 + 1),
            float(i),
            float(i),
            Vectors.dense([i, 2.0, 0.0]) if i % 2 else Vectors.sparse(3, {0: float(i), 1: 2.0}),
        )
        for i in range(1, 9)
    ]
    schema = T.StructType.fromDDL(
        "whole int, number float, money decimal(10,2), flag boolean, pair array<float>, grid array<array<int>>, "
        "raw binary, ragged array<float>, `a.dotted name` double, y float"
    ).add("vector", VectorUDT())
    return spark.createDataFrame(rows, schema).cache()


def decoded(data):
    return np.frombuffer(data, np.uint8).reshape(2, 2).astype(np.float32)


def first_of_each(parts):
    return nn.utils.rnn.pad_sequence(parts, batch_first=True)[:, :1]


# Argument -> (columns, shape of a row, dtype, mean of row i).
KINDS = {
    "two": (["number", "y"], (2,), torch.float32, lambda i: i),
    "one": ("number", (), torch.float32, lambda i: i),
    "listed": (["number"], (1,), torch.float32, lambda i: i),
    "pair": ("pair", (2,), torch.float32, lambda i: (i + 1) / 2),
    "grid": ("grid", (2, 2), torch.int64, lambda i: i),
    "vector": ("vector", (3,), torch.float32, lambda i: (i + 2) / 3),
    "together": (["vector", "pair", "number"], (6,), torch.float32, lambda i: (3 * i + 3) / 6),
    "whole": ("whole", (), torch.int64, lambda i: i),
    "flag": ("flag", (), torch.bool, lambda i: i % 2 == 0),
    "money": ("money", (), torch.float32, lambda i: i / 4),
    "mixed": (["whole", "number", "flag"], (3,), torch.float32, lambda i: (2 * i + (i % 2 == 0)) / 3),
    "dotted": ("a.dotted name", (), torch.float32, lambda i: i),
    "picture": ("raw", (2, 2), torch.float32, lambda i: (i + 6) / 4),
    "ragged": ("ragged", (1,), torch.float32, lambda i: i),
}


def test_every_kind_of_column_reaches_the_model_with_its_shape_dtype_and_numbers(mixed):
    model = estimator(
        model=partial(Recorder, {name: (shape, dtype) for name, (_, shape, dtype, _) in KINDS.items()}),
        loss=distance_of_means,
        optimizer=partial(torch.optim.SGD, lr=1e-3),
        feature_cols={name: columns for name, (columns, *_) in KINDS.items()},
        label_cols="y",
        decode={"raw": decoded},
        collate={"ragged": first_of_each},
    ).fit(mixed)
    with torch.no_grad():
        model.model.scale.fill_(1.0)
    rows = {row["whole"]: row["prediction"] for row in model.transform(mixed).collect()}
    assert rows == {i: pytest.approx([float(mean(i)) for *_, mean in KINDS.values()]) for i in range(1, 9)}


def test_named_columns_reach_named_arguments_and_integers_an_embedding(mixed):
    frame = mixed.withColumn("kind", F.col("whole") % 5)
    columns = {"dense": ["number", "flag"], "category": "kind"}
    model = regression(TwoTowers, feature_cols=columns, label_cols="y").fit(frame)
    assert not model.model.training
    assert model.transform(frame).where("prediction is null").count() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_keeps_its_dtype(mixed, dtype):
    model = regression(partial(Affine, 2, dtype), feature_cols=["number", "y"], label_cols=["y"]).fit(mixed)
    assert model.model.linear.weight.dtype == dtype
    expected = "double" if dtype == torch.float64 else "float"
    assert dict(model.transform(mixed).dtypes)["prediction"] == expected


def test_doubles_stay_doubles_for_a_float64_model(spark):
    tiny = 1.0 + 2.0**-40  # not a float32
    frame = spark.createDataFrame([(tiny, 1.0), (tiny, 1.0)], "x double, y double")
    model = regression(
        partial(Affine, 1, torch.float64), feature_cols=["x"], label_cols=["y"], num_workers=1, epochs=1
    ).fit(frame)
    with torch.no_grad():
        model.model.linear.weight.fill_(1.0)
        model.model.linear.bias.fill_(-1.0)
    assert [row["prediction"] for row in model.transform(frame).collect()] == [2.0**-40, 2.0**-40]


def test_row_weights_decide_what_is_learned(spark):
    rows = [(1.0, 0.0 if i % 2 else 10.0, 0.0 if i % 2 else 1.0) for i in range(32)]
    frame = spark.createDataFrame(
        [(*row, float(i)) for i, row in enumerate(rows)], "x float, y float, w float, id float"
    )
    settings = {"feature_cols": ["x"], "label_cols": ["y"], "epochs": 12, "optimizer": partial(torch.optim.SGD, lr=0.2)}
    weighted = regression(Affine, weight_col="w", **settings).fit(frame)
    plain = regression(Affine, **settings).fit(frame)
    value = {name: m.transform(frame).first()["prediction"] for name, m in (("w", weighted), ("plain", plain))}
    assert value["w"] == pytest.approx(10.0, abs=0.1)
    assert value["plain"] == pytest.approx(5.0, abs=1.5)
    assert sum(part.weight for part in weighted.history[0].replicas) <= 16


def test_a_fraction_validates_the_same_rows_every_time_and_no_row_is_lost(blobs):
    first, second = (ingest(frame, validation=0.25) for frame in (blobs, blobs.repartition(5).orderBy(F.desc("id"))))
    assert sum(counted(first, "train")) + sum(counted(first, "validation")) == 200
    assert 25 <= sum(counted(first, "validation")) <= 75
    assert digests(first) == digests(second)
    assert [f.rows for f in first.facts] == [f.rows for f in second.facts]


def test_a_boolean_column_and_a_second_dataframe_validate_exactly_their_rows(blobs):
    flagged = blobs.withColumn("held", F.col("id") < 30)
    column = ingest(flagged, validation="held")
    assert (sum(counted(column, "train")), sum(counted(column, "validation"))) == (170, 30)
    second = ingest(blobs, validation=blobs.where("id < 50"))
    assert (sum(counted(second, "train")), sum(counted(second, "validation"))) == (200, 50)
    split = ingest(blobs.where("id >= 30"), validation=blobs.where("id < 30"))
    assert digests(split) == digests(column)


def test_the_same_rows_in_another_order_make_the_same_shards_and_another_seed_others(blobs):
    shuffled = blobs.repartition(7, "pixels").orderBy(F.rand(3))
    own = digests(ingest(blobs))
    assert own == digests(ingest(shuffled)) == digests(ingest(blobs.coalesce(1)))
    assert own != digests(ingest(blobs, seed=1))
    changed = blobs.withColumn("label", F.when(F.col("id") == 7, F.col("label") + 1).otherwise(F.col("label")))
    assert own != digests(ingest(changed.withColumn("label", F.col("label") + (F.col("id") == 7).cast("int"))))


def test_rows_sorted_by_label_are_dealt_evenly_among_replicas(spark):
    rows = sorted(blob_rows(600), key=lambda row: row[2])
    frame = spark.createDataFrame(rows, "id int, pixels array<double>, label bigint").coalesce(1)
    model = estimator(model=LabelCount, epochs=1, batch_size=600, sync_every=1, loss=label_share, label_cols="label")
    shares = model.fit(frame).history[0]
    assert shares.loss == pytest.approx(sum(row[2] for row in rows) / 600, abs=1e-6)
    counts = [part.rows for part in shares.replicas]
    assert sum(counts) == 600
    assert min(counts) > 240


def test_every_row_is_read_exactly_once_an_epoch(spark):
    # The loss of a batch is the mean of its labels: its weighted sum over an epoch is the sum over all rows, once each.
    frame = spark.createDataFrame(
        [([float(i)] * 8, 2**i % 1009) for i in range(101)], "pixels array<double>, label int"
    )
    model = estimator(model=LabelCount, loss=label_share, epochs=3, batch_size=7, sync_every=3).fit(frame)
    expected = sum(2**i % 1009 for i in range(101))
    for epoch in (1, 2, 3):
        records = [record for record in model.history if record.epoch == epoch]
        assert sum(record.rows for record in records) == 101
        assert sum(record.loss * record.rows for record in records) == pytest.approx(expected, rel=1e-6)


@pytest.mark.fault(rows=[27], phases="LD")
def test_an_empty_shard_trains_with_weight_zero(spark):
    frame = spark.createDataFrame([([1.0] * 8, 1)] * 6, "pixels array<double>, label bigint")  # all rows are one row
    model = estimator(epochs=2).fit(frame)
    assert sorted(part.rows for part in model.history[0].replicas) == [0, 6]
    assert sorted(part.weight for part in model.history[0].replicas) == [0.0, 6.0]
    assert model.history[-1].loss < model.history[0].loss


def test_two_rows_are_enough_for_two_replicas(spark):
    frame = spark.createDataFrame([([1.0] * 8, 1), ([2.0] * 8, 0)], "pixels array<double>, label bigint")
    assert sum(record.rows for record in estimator().fit(frame).history) == 2


@pytest.mark.fault(rows=[28], phases="PF")
def test_columns_that_are_not_used_may_hold_anything(spark):
    row = ([1.0] * 8, 1, "text", None, dt.date(2024, 1, 1))
    frame = spark.createDataFrame([row] * 4, "pixels array<double>, label bigint, t string, n double, d date")
    assert weights(estimator().fit(frame))
