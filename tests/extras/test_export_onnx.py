"""ONNX files, run by onnxruntime: what `transform` writes, for any number of rows."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from pyspark.sql import functions as F
from torch import nn

from sparkdeep import ConfigError, TorchModel
from sparkdeep.data.schema import build_schema
from sparkdeep.spark.session.types import column_types

pytestmark = pytest.mark.extras


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )

    def forward(self, pixels):
        return self.layers(pixels.reshape(-1, 1, 4, 4))


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.kind = nn.Embedding(5, 4)
        self.head = nn.Linear(6, 1)

    def forward(self, numbers, kind):
        return self.head(torch.cat([numbers, self.kind(kind)], 1))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.weight if x.sum() > 0 else x


def shifted(pixels):
    return (pixels - 1.0) / 2.0


def model_for(frame, module, feature_cols, **options):
    types = column_types(frame.schema, [])
    schema = build_schema(types=types, feature_cols=feature_cols, label_cols=None, weight_col=None)
    if isinstance(feature_cols, str):
        schema = schema.with_seen({"features": ("float32", (16,))})
    return TorchModel(module=module.eval(), schema=schema, **options)


def predictions(model, frame):
    return np.array([row["prediction"] for row in model.transform(frame.coalesce(1)).collect()])


@pytest.fixture(scope="module")
def pixels(spark):
    values = F.array(*(((F.col("id") * (j + 3)) % 17 / 8).cast("double") for j in range(16)))
    return spark.range(20).select(values.alias("pixels")).coalesce(1)


@pytest.mark.parametrize("preprocess", [None, shifted], ids=["plain", "preprocess"])
def test_onnxruntime_gives_what_transform_writes(pixels, tmp_path, preprocess):
    torch.manual_seed(0)
    module = Convolutional()
    module(torch.randn(32, 16))
    model = model_for(pixels, module, "pixels", preprocess=preprocess)
    path = str(tmp_path / "net.onnx")
    model.export(path, format="onnx")
    onnx.checker.check_model(path)
    run = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.array([row["pixels"] for row in pixels.collect()], np.float32)
    expected = predictions(model, pixels)
    (name,) = [one.name for one in run.get_inputs()]
    for rows in (20, 1, 3):
        (got,) = run.run(None, {name: x[:rows]})
        np.testing.assert_allclose(got, expected[:rows], rtol=1e-4, atol=1e-5)
    (other,) = run.run(None, {name: x + 1})
    assert not np.allclose(other, expected, atol=1e-3)


def test_named_inputs_keep_their_names(spark, tmp_path):
    frame = spark.range(20).selectExpr("id / 7 AS a", "id % 3 / 2 AS b", "id % 5 AS kind").coalesce(1)
    torch.manual_seed(1)
    model = model_for(frame, Towers(), {"numbers": ["a", "b"], "kind": "kind"})
    path = str(tmp_path / "towers.onnx")
    model.export(path, format="onnx")
    run = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {one.name for one in run.get_inputs()} == {"numbers", "kind"}
    rows = frame.collect()
    given = {
        "numbers": np.array([[row["a"], row["b"]] for row in rows], np.float32),
        "kind": np.array([row["kind"] for row in rows], np.int64),
    }
    (got,) = run.run(None, given)
    np.testing.assert_allclose(got.reshape(-1), predictions(model, frame), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(pixels, tmp_path):
    model = model_for(pixels, Branching(), "pixels")
    with pytest.raises(ConfigError, match="cannot be exported as 'onnx'"):
        model.export(str(tmp_path / "net.onnx"), format="onnx")
    assert list(tmp_path.iterdir()) == []
