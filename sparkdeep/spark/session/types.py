"""Spark's column types as sparkdeep's; what cannot be trained on is refused, with what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql import types as T

from sparkdeep.data.schema import ColumnType
from sparkdeep.errors import DataError

__all__ = ["column_types", "quoted", "selectable"]

_SCALARS: dict[type, str] = {
    T.ByteType: "int8",
    T.ShortType: "int16",
    T.IntegerType: "int32",
    T.LongType: "int64",
    T.FloatType: "float32",
    T.DoubleType: "float64",
    T.DecimalType: "float64",
    T.BooleanType: "bool",
}


def quoted(name: str) -> str:
    """A column name as Spark resolves it literally, dots and backticks included."""
    return "`" + name.replace("`", "``") + "`"


def selectable(name: str, kind: T.DataType) -> Column:
    """A column of any name; decimals, which Arrow keeps as such, as doubles."""
    column = F.col(quoted(name))
    return column.cast("double") if isinstance(kind, T.DecimalType) else column


def column_types(schema: T.StructType, used: Iterable[str]) -> dict[str, ColumnType]:
    """The types of every usable column of a DataFrame.

    Raises:
        DataError: one of the `used` columns cannot become a tensor, or its name occurs twice.
    """
    wanted = set(used)
    types: dict[str, ColumnType] = {}
    for field in schema.fields:
        if field.name in types and field.name in wanted:
            raise DataError(f"column {field.name!r} occurs twice in the DataFrame; rename or drop one of the two.")
        found = _column_type(field.dataType)
        if found is not None:
            types[field.name] = found
        elif field.name in wanted:
            raise DataError(
                f"column {field.name!r} is of type {field.dataType.simpleString()}, which cannot become a tensor. "
                f"{_remedy(field.dataType)}"
            )
    return types


def _column_type(kind: T.DataType) -> ColumnType | None:
    if (dtype := _SCALARS.get(type(kind))) is not None:
        return ColumnType(kind="scalar", dtype=dtype)
    if isinstance(kind, T.BinaryType):
        return ColumnType(kind="binary", dtype="bytes")
    if isinstance(kind, T.UserDefinedType) and type(kind).__name__ == "VectorUDT":
        return ColumnType(kind="vector", dtype="float64")
    element: Any = kind
    while isinstance(element, T.ArrayType):
        element = element.elementType
    if element is not kind and type(element) in _SCALARS and not isinstance(element, T.DecimalType):
        return ColumnType(kind="array", dtype=_SCALARS[type(element)])
    return None


def _remedy(kind: T.DataType) -> str:
    if isinstance(kind, T.StringType):
        return "Index it (pyspark.ml.feature.StringIndexer), hash it, or parse the number it holds: col.cast('float')."
    if isinstance(kind, T.DateType | T.TimestampType):
        return "Derive numbers from it, such as unix_timestamp(col) or dayofyear(col)."
    if isinstance(kind, T.StructType):
        return "Select the struct's members as columns of their own: select('col.*')."
    return "Use numbers, booleans, arrays of them, Spark ML vectors, or bytes with decode=."
