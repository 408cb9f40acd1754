"""What columns are, and how the Arrow columns of a batch become fields."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from sparkdeep.data.arrow import (
    Array,
    FieldValues,
    Ragged,
    Source,
    is_list,
    read_elements,
    read_lists,
    read_ragged,
    read_vectors,
)
from sparkdeep.data.decoding import is_binary, read_binary
from sparkdeep.data.faults import Faults
from sparkdeep.data.schema import (
    Callables,
    ColumnKind,
    ColumnNames,
    ColumnType,
    Field,
    Schema,
    build_schema,
    callable_for,
)
from sparkdeep.errors import DataError

__all__ = [
    "Callables",
    "ColumnKind",
    "ColumnNames",
    "ColumnType",
    "Faults",
    "Field",
    "FieldValues",
    "Ragged",
    "Schema",
    "build_schema",
    "read_fields",
]


def read_fields(
    batch: pa.RecordBatch, schema: Schema, faults: Faults, decode: Callables = None
) -> dict[str, FieldValues]:
    """Turn one Arrow batch into the schema's fields.

    Nulls, NaN values and arrays of uneven length are counted in `faults`, and zeros stand in their place.

    Args:
        batch: the columns of `schema.columns()`, among others; 0 rows are fine.
        schema: the fields to make.
        faults: one object for all batches of a reader; it also remembers the row shapes met first.
        decode: for binary columns, bytes to array: one callable, or one per column.

    Returns:
        Field name to (rows, *shape) in the field's dtype, or Ragged. Arrays may be read-only views of the batch.

    Raises:
        DataError: a weight is negative or infinite, or a column is not what the schema says.
        UserCodeError: `decode` raised.
    """
    return {field.name: _read_field(batch, field, schema, faults, decode) for field in schema.fields}


def _read_field(batch: pa.RecordBatch, field: Field, schema: Schema, faults: Faults, decode: Callables) -> FieldValues:
    # A field of several columns has a shape of its own, which says nothing about one column's rows.
    shape = field.shape if len(field.columns) == 1 and not field.ragged else None
    blocks = []
    for column in field.columns:
        if batch.schema.get_field_index(column) < 0:
            raise DataError(
                f"the batch has no single column {column!r} among {batch.schema.names}: select each column once"
            )
        array, source = batch.column(column), Source(column=column, faults=faults, shape=shape)
        if field.ragged:
            return read_ragged(array, source, field.dtype)
        if is_binary(array.type):
            function = callable_for(column, decode)
            assert function is not None, "build_schema demands decode= for binary columns"
            blocks.append(read_binary(array, source, function, field, schema.float_dtype))
        elif pa.types.is_struct(array.type):
            blocks.append(read_vectors(array, source))
        elif is_list(array.type):
            blocks.append(read_lists(array, source))
        else:
            blocks.append(read_elements(array, source))
    values = _assemble(blocks, field, batch.num_rows)
    if field.role == "weight":
        _check_weights(values, field.columns[0])
    return values


def _assemble(blocks: list[Array], field: Field, rows: int) -> Array:
    """Lay the blocks of a field side by side, (rows, k), or keep the only one's natural shape."""
    dtype: np.dtype[Any] = blocks[0].dtype if field.dtype == "decoded" else np.dtype(field.dtype)
    for column, block in zip(field.columns, blocks, strict=True):
        if not np.can_cast(block.dtype, dtype, "same_kind"):
            raise DataError(
                f"column {column!r} holds {block.dtype}, but field {field.name!r} stores {dtype}: "
                "the DataFrame changed its types; cast the column in Spark"
            )
    if len(blocks) == 1 and not (field.stacked and blocks[0].ndim == 1):
        return blocks[0].astype(dtype, copy=False)
    for column, block in zip(field.columns, blocks, strict=True):
        if block.ndim > 2:
            raise DataError(
                f"column {column!r} holds arrays of shape {block.shape[1:]}, which cannot lie beside other columns in "
                f"field {field.name!r}: give it its own key in a dict"
            )
    widths = [1 if block.ndim == 1 else block.shape[1] for block in blocks]
    if field.shape is not None and (sum(widths),) != field.shape:
        if rows:
            raise DataError(
                f"field {field.name!r} is {sum(widths)} values wide here, and its rows had shape {field.shape} before: "
                f"pad or cut the arrays among {list(field.columns)} to one length in Spark"
            )
        return np.zeros((0, *field.shape), dtype)
    out = np.empty((rows, sum(widths)), dtype)
    start = 0
    for block, width in zip(blocks, widths, strict=True):
        out[:, start : start + width] = block.reshape(rows, width)
        start += width
    return out


def _check_weights(weights: Array, column: str) -> None:
    wrong = (weights < 0) | np.isinf(weights)
    if wrong.any():
        raise DataError(
            f"weight column {column!r} holds {weights[wrong][0]!s}: weights must be finite and zero or more; "
            "filter or clip them in Spark"
        )
