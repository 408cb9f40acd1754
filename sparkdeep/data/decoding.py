"""Binary columns: the user's `decode` turns each row's bytes into an array."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from sparkdeep.data.arrow import Array, Source, shaped, without_nans
from sparkdeep.data.petastorm.codecs import FieldDecoder
from sparkdeep.data.schema import Field
from sparkdeep.errors import DataError, UserCodeError

__all__ = ["is_binary", "read_binary"]


def is_binary(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds bytes."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def read_binary(array: pa.Array, source: Source, decode: Callable[..., Any], field: Field, float_dtype: str) -> Array:
    """Return the decoded rows as (rows, *shape) in the dtype that `decode` returns, float64 as `float_dtype`.

    Rows of another shape than the first are counted as faults of length, null rows as nulls.

    Raises:
        DataError: `decode` gave no numbers, or dtypes or dimensions that differ.
        UserCodeError: `decode` raised.
    """
    source.faults.count_nulls(source.column, array.null_count)
    if isinstance(decode, FieldDecoder):
        return _read_rows(array, source, decode, float_dtype)
    dtype = None if field.dtype == "decoded" else np.dtype(field.dtype)
    out: Array | None = None
    for row, item in enumerate(array):
        if not item.is_valid:
            continue
        value = _decoded(decode, item.as_py(), source.column, row, float_dtype)
        dtype = value.dtype if dtype is None else dtype
        if value.dtype != dtype:
            raise DataError(
                f"decode= gave {value.dtype} for column {source.column!r}, row {row} of a batch, and {dtype} before: "
                "return one dtype"
            )
        if out is None:
            # A single number listed alone is stored as (B, 1); as decoded it still has no dimension.
            if field.stacked and value.ndim == 0:
                source = Source(column=source.column, faults=source.faults, shape=None)
            out = shaped(np.zeros(0, dtype), source, len(array), value.shape, usable=False)
        if value.ndim != out.ndim - 1:
            raise DataError(
                f"decode= gave shape {value.shape} for column {source.column!r}, row {row} of a batch, and "
                f"{out.shape[1:]} before: return one shape"
            )
        for axis, size in enumerate(value.shape):
            source.faults.note_lengths(source.column + "[*]" * axis, size, size)
        if value.shape == out.shape[1:]:
            out[row] = value
    if out is None:
        return np.zeros((len(array), *(source.expected or ())), dtype or np.dtype(float_dtype))
    return without_nans(out, source)


def _read_rows(array: pa.Array, source: Source, decode: FieldDecoder, float_dtype: str) -> Array:
    """Return a column that petastorm encoded, decoded as a whole."""
    values = decode.rows(array)
    if values.dtype == np.float64:
        values = values.astype(float_dtype, copy=False)
    out = shaped(values, source, len(array), values.shape[1:], usable=len(values) == len(array))
    return without_nans(out, source)


def _decoded(decode: Callable[..., Any], data: bytes, column: str, row: int, float_dtype: str) -> Array:
    try:
        value = np.asarray(decode(data))
    except Exception as error:
        raise UserCodeError(
            f"decode= raised {type(error).__name__} on column {column!r}, row {row} of a batch ({len(data)} bytes): "
            f"{error}. It must turn these bytes into a numpy array; try it on one value of the column",
            traceback_text=traceback.format_exc(),
        ) from error
    if value.dtype.kind not in "biuf":
        raise DataError(
            f"decode= gave {value.dtype} for column {column!r}, row {row} of a batch: return an array of numbers"
        )
    if value.dtype == np.float64:
        value = value.astype(float_dtype, copy=False)
    return value.astype(value.dtype.newbyteorder("="), copy=False)
