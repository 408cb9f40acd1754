"""Rows of every kind of field that petastorm encodes and replicas can train on: written by petastorm, known by number."""

from __future__ import annotations

import warnings
from decimal import Decimal
from functools import partial

import numpy as np
import torch
from petastorm.codecs import CompressedImageCodec, CompressedNdarrayCodec, NdarrayCodec, ScalarCodec
from petastorm.etl.dataset_metadata import materialize_dataset
from petastorm.predicates import PredicateBase
from petastorm.unischema import Unischema, UnischemaField, dict_to_spark_row
from pyspark.sql import types as T
from torch import nn

SCHEMA = Unischema(
    "Samples",
    [
        UnischemaField("id", np.int64, (), ScalarCodec(T.LongType()), False),
        UnischemaField("small", np.uint8, (), ScalarCodec(T.ShortType()), False),
        UnischemaField("third", np.bool_, (), ScalarCodec(T.BooleanType()), False),
        UnischemaField("price", Decimal, (), ScalarCodec(T.DecimalType(10, 2)), False),
        UnischemaField("name", np.str_, (), ScalarCodec(T.StringType()), False),
        UnischemaField("x", np.float32, (3, 4), NdarrayCodec(), False),
        UnischemaField("half", np.float16, (2,), NdarrayCodec(), False),
        UnischemaField("trace", np.int32, (None,), CompressedNdarrayCodec(), True),
        UnischemaField("boxes", np.float64, (None, 2), NdarrayCodec(), True),
        UnischemaField("image", np.uint8, (5, 4, 3), CompressedImageCodec("png"), False),
        UnischemaField("label", np.int64, (), ScalarCodec(T.LongType()), False),
    ],
)


def row(number):
    """Row `number`: the same in every process."""
    random = np.random.default_rng(number)
    x = random.normal(size=(3, 4)).astype(np.float32)
    return {
        "id": np.int64(number),
        "small": np.uint8(250 - number),
        "third": np.bool_(number % 3 == 0),
        "price": Decimal(number) / 4,
        "name": f"row {number}",
        "x": x,
        "half": random.normal(size=2).astype(np.float16),
        "trace": None if number % 7 == 0 else random.integers(-9, 9, number % 4).astype(np.int32),
        "boxes": None if number % 5 == 0 else random.random((number % 3, 2)),
        "image": random.integers(0, 256, (5, 4, 3)).astype(np.uint8),
        "label": np.int64(x[0].sum() > 0),
    }


def encoded(number):
    return dict_to_spark_row(SCHEMA, row(number))


def write_samples(spark, url, *, rows, files, schema=SCHEMA, make=encoded):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with materialize_dataset(spark, url, schema):
            made = spark.sparkContext.parallelize(range(rows), files).map(make)
            spark.createDataFrame(made, schema.as_spark_schema()).write.parquet(url)


class Net(nn.Module):
    """A row of (3, 4) or (3,) to two or three classes."""

    def __init__(self, inputs=12, classes=2):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, classes))

    def forward(self, x):
        return self.layers(x)


def settings(**more):
    """Of an estimator that trains `Net` on x and label."""
    return {
        "model": Net,
        "loss": nn.CrossEntropyLoss(),
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "feature_cols": "x",
        "label_cols": "label",
        "num_workers": 2,
        "batch_size": 8,
        "epochs": 3,
        "sync_every": 2,
        "seed": 1,
        "progress": False,
        **more,
    }


class Stuck(PredicateBase):
    """A predicate that never answers, as storage that hangs."""

    def __init__(self, field):
        self.field = field

    def get_fields(self):
        return {self.field}

    def do_include(self, values):
        import time

        time.sleep(20.0)
        return True
