from __future__ import annotations

import json

import pytest

from sparkdeep.data.schema import ColumnType, Field, Schema, build_schema
from sparkdeep.errors import ConfigError, DataError

TYPES = {
    "age": ColumnType(kind="scalar", dtype="int32"),
    "income": ColumnType(kind="scalar", dtype="float64"),
    "married": ColumnType(kind="scalar", dtype="bool"),
    "pixels": ColumnType(kind="array", dtype="float32"),
    "tokens": ColumnType(kind="array", dtype="int64"),
    "dense": ColumnType(kind="vector", dtype="float64"),
    "image": ColumnType(kind="binary", dtype="bytes"),
    "y": ColumnType(kind="scalar", dtype="int8"),
    "w": ColumnType(kind="scalar", dtype="int32"),
}


def schema(**settings):
    return build_schema(
        **{"types": TYPES, "feature_cols": "age", "label_cols": None, "weight_col": None, **settings},
    )


def field(**settings) -> Field:
    return schema(**settings).fields[0]


def test_one_name_keeps_the_natural_shape():
    got = field(feature_cols="age")
    assert got == Field(
        name="features",
        role="features",
        argument=None,
        columns=("age",),
        stacked=False,
        dtype="int64",
        ragged=False,
        shape=(),
    )


def test_a_list_is_stacked_and_its_width_is_known_when_all_are_scalars():
    got = field(feature_cols=["age", "income"])
    assert (got.stacked, got.shape, got.dtype) == (True, (2,), "float32")
    assert field(feature_cols=["age", "pixels"]).shape is None


def test_a_dict_makes_one_field_per_argument():
    got = schema(feature_cols={"user": "age", "wide": ["income", "dense"]}, label_cols={"a": "y", "b": "income"})
    assert [(f.name, f.argument, f.role) for f in got.fields] == [
        ("features.user", "user", "features"),
        ("features.wide", "wide", "features"),
        ("label.a", "a", "label"),
        ("label.b", "b", "label"),
    ]


@pytest.mark.parametrize(
    ("columns", "float_dtype", "dtype"),
    [
        (["age", "y"], "float32", "int64"),
        (["married"], "float32", "bool"),
        (["age", "married"], "float32", "int64"),
        (["age", "income"], "float64", "float64"),
        (["dense"], "float32", "float32"),
        ("tokens", "float32", "int64"),
    ],
)
def test_integers_stay_integers_and_any_float_makes_floats(columns, float_dtype, dtype):
    assert field(feature_cols=columns, float_dtype=float_dtype).dtype == dtype


def test_weight_is_a_float_even_from_integers():
    weight = schema(label_cols="y", weight_col="w").fields[-1]
    assert (weight.name, weight.dtype, weight.shape) == ("weight", "float32", ())


def test_columns_come_once_each_in_order():
    got = schema(feature_cols={"a": ["income", "age"], "b": "age"}, label_cols="income", weight_col="w")
    assert got.columns() == ("income", "age", "w")


def test_collate_makes_array_columns_ragged_and_only_those():
    both = schema(feature_cols={"t": "tokens", "d": "dense"}, collate=list)
    assert [f.ragged for f in both.fields] == [True, False]
    chosen = schema(feature_cols={"t": "tokens", "p": "pixels"}, collate={"tokens": list})
    assert [(f.ragged, f.shape) for f in chosen.fields] == [(True, ()), (False, None)]


def test_json_round_trip_is_equal():
    got = schema(
        feature_cols={"t": "tokens", "x": ["age", "pixels"]}, label_cols="y", weight_col="w", collate={"tokens": list}
    )
    assert Schema.from_json(json.loads(json.dumps(got.to_json()))) == got


def test_seen_shapes_are_fixed_and_contradictions_refused():
    got = schema(feature_cols="image", label_cols="y", decode=bytes)
    assert (got.fields[0].dtype, got.fields[0].shape) == ("decoded", None)
    fixed = got.with_seen({"features": ("uint8", (3, 4))})
    assert (fixed.fields[0].dtype, fixed.fields[0].shape) == ("uint8", (3, 4))
    assert fixed.fields[1] == got.fields[1]
    assert fixed.with_seen({"features": ("uint8", (3, 4))}) == fixed
    with pytest.raises(DataError, match=r"'features'.*uint8 \(3, 5\).*uint8 \(3, 4\).*one shape in Spark"):
        fixed.with_seen({"features": ("uint8", (3, 5))})
    with pytest.raises(DataError, match="earlier rows were uint8"):
        fixed.with_seen({"features": ("int8", (3, 4))})
    with pytest.raises(DataError, match=r"\['other'\] are not in the schema"):
        fixed.with_seen({"other": ("int64", ())})


def test_a_missing_column_is_named_with_similar_ones():
    with pytest.raises(DataError, match=r"'incom'.*similar: 'income'"):
        schema(feature_cols=["age", "incom"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_cols": "image"}, "'image' holds bytes: pass decode="),
        ({"feature_cols": "image", "decode": {"image": 3}}, "a callable, or a dict"),
        ({"feature_cols": "age", "decode": {"agee": bytes}}, r"'agee', which no field uses \(similar: 'age'\)"),
        ({"feature_cols": "age", "decode": {"age": bytes}}, "'age' of kind scalar: it is for binary"),
        ({"feature_cols": "dense", "collate": {"dense": list}}, "'dense' of kind vector: it is for array"),
        ({"feature_cols": ["age", "income", "age"]}, r"names \['age'\] more than once"),
        ({"feature_cols": []}, r"feature_cols=\[\]: at least one column"),
        ({"feature_cols": {}}, "feature_cols={}: at least one column"),
        ({"feature_cols": {"a": []}}, r"feature_cols\['a'\]=\[\]"),
        ({"feature_cols": {"a b": "age"}}, "'a b'.*identifiers"),
        ({"feature_cols": [1]}, "a column name, a list of names"),
        ({"feature_cols": 7}, "a column name, a list of names"),
        ({"label_cols": []}, r"label_cols=\[\]"),
        ({"feature_cols": ["age", "image"], "decode": bytes}, "binary column with others.*its own key"),
        ({"feature_cols": ["age", "tokens"], "collate": list}, "different length.*its own key"),
        ({"weight_col": "pixels"}, "weight_col='pixels' is of kind array"),
        ({"weight_col": ["w"]}, r"weight_col=\['w'\]: one column name"),
        ({"float_dtype": "bfloat16"}, "float_dtype='bfloat16'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_with_a_remedy(settings, message):
    with pytest.raises(ConfigError, match=message):
        schema(**settings)
