"""What each example of docs/extending.md must do, from its public setting to the end; without its change each fails."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
from functools import partial

import cloudpickle
import numpy as np
import pyarrow as pa
import torch
from pyspark.sql import types as T
from torch import nn
from torch.optim import SGD
from twin import deal, flat, run, schema_of

from sparkdeep.data.columns import build_schema
from sparkdeep.data.shards import Shard
from sparkdeep.models.program import Program
from sparkdeep.optim.aggregators import Changes
from sparkdeep.settings.run import LocalSettings
from sparkdeep.spark.ingest.tasks import FLAG, IngestJob, numbered, written
from sparkdeep.spark.model.params import ESTIMATOR_PARAMS
from sparkdeep.spark.model.stored_values import from_json, named_value, to_json
from sparkdeep.spark.session.types import column_types
from sparkdeep.tensors.encoding import codec_named, encoded_bytes
from sparkdeep.tensors.parameters import Layout


def fitted(folder, **options):
    """The parameters that three replicas of eight rows come to, and the rounds' records."""
    x = np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32)
    y = x @ np.array([[1.0], [-2.0]], np.float32) + np.repeat([0.0, 0.2, 2.0], 8)[:, None].astype(np.float32)
    torch.manual_seed(0)
    own = Program(model=nn.Linear(2, 1), loss=nn.MSELoss(), optimizer=partial(SGD, lr=0.1))
    settings = {"epochs": 2, "batch_size": 4, "sync_every": 2, **options}
    module, records, _ = run(folder, own, deal(x, y, [8, 8, 8]), schema_of(x, y), **settings)
    return flat(module).double(), records


def kept(setting, value):
    """A value comes back from a saved estimator and from a TOML file, and `explainParams` names it."""
    assert from_json(json.loads(json.dumps(to_json(value, setting))), setting) == value
    assert named_value(setting, {"name": type(value).__name__, **dataclasses.asdict(value)}) == value
    assert f"{type(value).__name__}(" in ESTIMATOR_PARAMS[setting]


def aggregator(folder):
    from sparkdeep import GeometricMedian

    points = torch.tensor([[0, 0], [4, 0], [5, 3], [1, 4]], dtype=torch.float64)
    layout = Layout.of(nn.Linear(2, 1, bias=False).double())
    options = {"start": torch.ones(2, dtype=torch.float64), "differences": False}
    total = Changes(GeometricMedian(), layout, [1.0] * 4, out=torch.empty(2, dtype=torch.float64), **options)
    for i, point in enumerate(points):
        total.add(i, lambda start, stop, point=point: point[start:stop], lambda: None)
    crossing = 16 / 29 * points[2]  # of four points around, where the diagonals cross
    torch.testing.assert_close(total.mean(), crossing, rtol=0, atol=1e-6)

    mean, _ = fitted(folder)
    median, records = fitted(folder, aggregator=GeometricMedian())
    assert median[-1] < mean[-1] - 0.05, "the third replica, whose labels are far off, counts for less"
    assert records[-1].loss < records[0].loss
    kept("aggregator", GeometricMedian(20))


def codec(folder):
    LocalSettings(codec="fp16", down_codec="fp16", error_feedback=True)
    exact, _ = fitted(folder)
    half, _ = fitted(folder, codec="fp16", down_codec="fp16")
    bf16, _ = fitted(folder, codec="bf16", down_codec="bf16")
    assert 0 < (half - exact).norm() < (bf16 - exact).norm() / 2 < 0.01
    assert encoded_bytes(codec_named("fp16"), 100, torch.float32) == 200
    large = codec_named("fp16").encode(torch.tensor([1e30, -1e30]))
    assert codec_named("fp16").decode(large, 2, torch.float32).tolist() == [65504.0, -65504.0]
    assert "'fp16'" in ESTIMATOR_PARAMS["codec"]


def rule(folder):
    from sparkdeep import Growing

    _, records = fitted(folder, schedule=Growing(2), sync_every=1, batch_size=1)
    steps = [max(part.steps for part in record.replicas) for record in records]
    assert steps == [1, 3, 4, 7, 1], "1, 3, 5, 7, 9, but for the ends of epochs"
    kept("schedule", Growing(2))


def column(folder):
    kinds = {"day": T.DateType(), "x": T.DoubleType(), "days": T.ArrayType(T.DateType()), "y": T.DoubleType()}
    types = column_types(T.StructType([T.StructField(name, kind) for name, kind in kinds.items()]), kinds)
    features = {"wide": ["day", "x"], "list": "days"}
    schema = build_schema(types=types, feature_cols=features, label_cols="y", weight_col=None)
    days = [dt.date(1970, 1, 11), dt.date(2000, 1, 1), dt.date(1969, 12, 31)]
    values = {
        "day": pa.array(days),
        "x": [0.5, 1.5, 2.5],
        "days": pa.array([[day] * 2 for day in days]),
        "y": [1.0] * 3,
    }
    arrays = {numbered(i): values[name] for i, name in enumerate(schema.columns())}
    batch = pa.RecordBatch.from_pydict({**arrays, FLAG: [False] * 3})
    job = IngestJob(run="run", schema=schema, decode=cloudpickle.dumps(None), shard_dir=None)
    _, faults, rows = written(job, folder / "shard", [batch])
    assert not faults.found
    assert rows == 3
    with contextlib.closing(Shard.open(folder / "shard")) as shard:
        fields = shard.head(3)
    assert fields["features.wide"].tolist() == [[10.0, 0.5], [10957.0, 1.5], [-1.0, 2.5]]
    assert fields["features.list"].tolist() == [[10, 10], [10957, 10957], [-1, -1]]
