"""A network, a module and a preprocess function that other processes can import, and a model trained by hand."""

from __future__ import annotations

import torch
from torch import nn

from sparkdeep.data.schema import ColumnType, build_schema
from sparkdeep.models.registry import reference_of, register
from sparkdeep.spark.model.model import TorchModel


class Net(nn.Module):
    """A number and an array of three in, three classes out."""

    def __init__(self, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, area, pixels):
        return self.layers(torch.cat([area.unsqueeze(1), pixels], 1))


class Sum(nn.Module):
    """Two numbers laid side by side in, one out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x)


@register
def halved(features):
    return {name: value / 2 for name, value in features.items()}


_TYPES = {
    "area": ColumnType(kind="scalar", dtype="float64"),
    "age": ColumnType(kind="scalar", dtype="float64"),
    "pixels": ColumnType(kind="array", dtype="float64"),
}


def two_inputs(**options):
    """Columns area and pixels; the class as the prediction unless told otherwise."""
    schema = build_schema(
        types=_TYPES, feature_cols={"area": "area", "pixels": "pixels"}, label_cols=None, weight_col=None
    )
    schema = schema.with_seen({"features.pixels": ("float32", (3,))})
    settings = {"prediction": "argmax", "reference": reference_of(Net, {"width": 5}), **options}
    return TorchModel(module=Net(width=5).eval(), schema=schema, **settings)


def side_by_side(**options):
    schema = build_schema(types=_TYPES, feature_cols=["area", "age"], label_cols=None, weight_col=None)
    return TorchModel(module=Sum().eval(), schema=schema, reference=reference_of(Sum, None), **options)
