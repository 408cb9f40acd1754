from __future__ import annotations

import pytest

T = pytest.importorskip("pyspark.sql.types")

from pyspark.ml.linalg import VectorUDT  # noqa: E402

from sparkdeep.data.schema import ColumnType  # noqa: E402
from sparkdeep.errors import DataError  # noqa: E402
from sparkdeep.spark.session.types import column_types, quoted  # noqa: E402


def schema(**kinds):
    return T.StructType([T.StructField(name, kind) for name, kind in kinds.items()])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (T.ByteType(), ("scalar", "int8")),
        (T.ShortType(), ("scalar", "int16")),
        (T.IntegerType(), ("scalar", "int32")),
        (T.LongType(), ("scalar", "int64")),
        (T.FloatType(), ("scalar", "float32")),
        (T.DoubleType(), ("scalar", "float64")),
        (T.DecimalType(12, 2), ("scalar", "float64")),
        (T.BooleanType(), ("scalar", "bool")),
        (T.BinaryType(), ("binary", "bytes")),
        (VectorUDT(), ("vector", "float64")),
        (T.ArrayType(T.FloatType()), ("array", "float32")),
        (T.ArrayType(T.ArrayType(T.IntegerType())), ("array", "int32")),
    ],
    ids=str,
)
def test_a_column_that_can_become_a_tensor_has_its_kind_and_element(kind, expected):
    assert column_types(schema(x=kind), ["x"]) == {"x": ColumnType(kind=expected[0], dtype=expected[1])}


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        (T.StringType(), "StringIndexer"),
        (T.DateType(), "unix_timestamp"),
        (T.TimestampType(), "dayofyear"),
        (T.StructType([T.StructField("a", T.IntegerType())]), r"select\('col\.\*'\)"),
        (T.MapType(T.StringType(), T.IntegerType()), "arrays of them"),
        (T.ArrayType(T.StringType()), "arrays of them"),
        (T.ArrayType(T.DecimalType(5, 1)), "arrays of them"),
    ],
    ids=str,
)
def test_any_other_column_is_refused_with_what_to_do_but_only_when_it_is_used(kind, remedy):
    frame = schema(x=kind, y=T.LongType())
    assert column_types(frame, ["y"]) == {"y": ColumnType(kind="scalar", dtype="int64")}
    with pytest.raises(DataError, match=rf"column 'x' is of type .*cannot become a tensor.*{remedy}"):
        column_types(frame, ["x", "y"])


def test_a_name_that_occurs_twice_is_refused_only_when_it_is_used():
    twice = T.StructType([T.StructField("x", T.LongType()), T.StructField("x", T.LongType())])
    assert column_types(twice, ["other"])
    with pytest.raises(DataError, match=r"'x' occurs twice.*rename or drop"):
        column_types(twice, ["x"])


def test_names_are_quoted_so_that_dots_and_backticks_are_letters():
    assert quoted("a.b") == "`a.b`"
    assert quoted("a`b") == "`a``b`"
