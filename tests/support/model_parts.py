"""A small network and a schema for tests of models that were not fitted."""

from __future__ import annotations

from torch import nn

from sparkdeep.data.schema import ColumnType, build_schema


class Net(nn.Module):
    def __init__(self, inputs=2):
        super().__init__()
        self.linear = nn.Linear(inputs, 3)

    def forward(self, x):
        return self.linear(x)


def schema(feature_cols=("a", "b"), **options):
    types = {name: ColumnType(kind="scalar", dtype="float64") for name in "abcdy"}
    types["bytes"] = ColumnType(kind="binary", dtype="bytes")
    types["words"] = ColumnType(kind="array", dtype="int64")
    if not isinstance(feature_cols, str | dict):
        feature_cols = list(feature_cols)
    return build_schema(types=types, feature_cols=feature_cols, label_cols="y", weight_col=None, **options)
