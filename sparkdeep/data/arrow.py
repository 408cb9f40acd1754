"""Arrow columns of numbers, arrays and Spark ML vectors to numpy: by whole columns, never by rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sparkdeep.data.faults import Faults
from sparkdeep.errors import DataError

__all__ = [
    "Array",
    "FieldValues",
    "Ragged",
    "Source",
    "is_list",
    "read_elements",
    "read_lists",
    "read_ragged",
    "read_vectors",
    "shaped",
    "without_nans",
]

Array = npt.NDArray[Any]


class Ragged(NamedTuple):
    """Rows of different length, end to end."""

    values: Array
    """(sum of lengths,), the field's dtype."""
    lengths: Array
    """(rows,) int64."""


FieldValues = Array | Ragged


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one column's values come from and where its faults are counted."""

    column: str
    """Name in the DataFrame, for messages and counts."""
    faults: Faults
    """The reader's counts, which also hold the first row shape that it met."""
    shape: tuple[int, ...] | None
    """Row shape fixed earlier; None where the column's first rows fix it."""

    @property
    def expected(self) -> tuple[int, ...] | None:
        """Row shape that all rows must have, as far as it is known."""
        return self.shape if self.shape is not None else self.faults.first.get(self.column)


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds arrays."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def read_elements(array: pa.Array, source: Source) -> Array:
    """Return numbers or booleans as (n,) in Arrow's own dtype, without a copy where there is nothing to replace.

    Raises:
        DataError: the column holds something else.
    """
    kind = array.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(
            f"column {source.column!r} holds {kind}: only numbers, booleans, arrays of these, vectors and binary can "
            "be trained on; cast it in Spark"
        )
    if array.null_count:
        source.faults.count_nulls(source.column, array.null_count)
        array = array.fill_null(False if pa.types.is_boolean(kind) else 0)
    return without_nans(array.to_numpy(zero_copy_only=False), source)


def without_nans(values: Array, source: Source) -> Array:
    """Return the values with NaN counted and replaced by zero; without NaN the same array."""
    if values.dtype.kind != "f":
        return values
    # One pass that allocates nothing. As a sum of infinities may be NaN too, only the count below decides.
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isnan(np.sum(values)):
            return values
    missing = np.isnan(values)
    count = int(np.count_nonzero(missing))
    source.faults.count_nans(source.column, count)
    return np.where(missing, values.dtype.type(0), values) if count else values


def read_lists(array: pa.Array, source: Source) -> Array:
    """Return arrays (of arrays) as (rows, n, ...) by flattening level after level."""
    rows, even, level = len(array), True, source.column
    met: list[int] = []
    while is_list(array.type):
        present = _present(array, source)
        lengths = _lengths(present)
        met.append(int(lengths[0]) if len(lengths) else -1)
        if len(lengths):
            source.faults.note_lengths(level, int(lengths.min()), int(lengths.max()))
            even = even and bool((lengths == lengths[0]).all())
        even = even and len(present) == len(array)
        array, level = present.flatten(), level + "[*]"
    values = read_elements(array, source)
    return shaped(values if even else np.zeros(0, values.dtype), source, rows, tuple(met), usable=even)


def shaped(values: Array, source: Source, rows: int, met: tuple[int, ...], *, usable: bool) -> Array:
    """Return flat values as (rows, *met), or zeros of the row shape met first where they cannot be.

    Args:
        values: all elements of all rows, end to end.
        source: knows the row shape met first.
        rows: number of rows, nulls included.
        met: row shape met here; -1 for a dimension that no row fixes.
        usable: whether every row is present and has that shape.

    Raises:
        DataError: the number of dimensions differs from that of the rows seen first.
    """
    expected = source.expected
    if expected is not None and len(expected) != len(met):
        raise DataError(
            f"column {source.column!r} holds arrays of {len(met)} dimension(s), and the rows seen first had "
            f"{len(expected)}: all rows must agree; reshape them in Spark"
        )
    if -1 in met:
        return np.zeros((rows, *(expected or [max(size, 0) for size in met])), values.dtype)
    expected = source.faults.first.setdefault(source.column, expected if expected is not None else met)
    for axis, size in enumerate(expected):
        source.faults.note_lengths(source.column + "[*]" * axis, size, size)
    if not usable or met != expected:
        return np.zeros((rows, *expected), values.dtype)
    return values.reshape(rows, *expected)


def read_ragged(array: pa.Array, source: Source, dtype: str) -> Ragged:
    """Return arrays of different length end to end, with their lengths; a null row has length 0.

    Raises:
        DataError: the column holds no arrays, or arrays of arrays.
    """
    if not is_list(array.type) or is_list(array.type.value_type):
        raise DataError(
            f"column {source.column!r} holds {array.type}: collate= is for arrays of numbers; flatten it in Spark"
        )
    lengths = np.zeros(len(array), np.int64)
    filled = array.is_valid().to_numpy(zero_copy_only=False)
    present = _present(array, source)
    lengths[filled] = _lengths(present)
    values = read_elements(present.flatten(), source)
    if not np.can_cast(values.dtype, dtype, "same_kind"):
        raise DataError(f"column {source.column!r} holds {values.dtype}, not {dtype} as before: cast it in Spark")
    return Ragged(values.astype(dtype, copy=False), lengths)


def read_vectors(array: pa.Array, source: Source) -> Array:
    """Return Spark ML vectors, struct<type, size, indices, values> where type 0 is sparse, as (rows, n) float64.

    Raises:
        DataError: the structs are not vectors, or a sparse one is malformed.
    """
    if [array.type.field(i).name for i in range(array.type.num_fields)] != ["type", "size", "indices", "values"]:
        raise DataError(
            f"column {source.column!r} holds {array.type}: of structs only Spark ML vectors can be trained on; select "
            "its members as columns"
        )
    rows = len(array)
    array = _present(array, source)
    kinds, sizes, indices, values = (array.field(i) for i in range(4))
    sparse = kinds.to_numpy(zero_copy_only=False) == 0  # (present rows,) bool
    counts = _lengths(values)
    widths = np.where(sparse, sizes.fill_null(0).to_numpy(zero_copy_only=False), counts)
    flat = read_elements(values.flatten(), source)
    if not len(widths):
        return shaped(flat, source, rows, (-1,), usable=False)
    width = int(widths[0])
    source.faults.note_lengths(source.column, int(widths.min()), int(widths.max()))
    even = len(array) == rows and bool((widths == width).all())
    if even and sparse.any():
        chosen = indices.filter(pa.array(sparse)).flatten().to_numpy(zero_copy_only=False)
        out = np.zeros((rows, width), flat.dtype)
        out[_places(counts, sparse, chosen, source, width)] = flat
        flat = out
    return shaped(flat, source, rows, (width,), usable=even)


def _places(counts: Array, sparse: Array, indices: Array, source: Source, width: int) -> tuple[Array, Array]:
    """Return row and position, (values,) int64 each, of every stored value of mixed dense and sparse vectors."""
    row = np.repeat(np.arange(len(counts)), counts)
    position = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
    from_sparse = sparse[row]
    remedy = "rebuild the vectors, for example with VectorAssembler"
    if len(indices) != np.count_nonzero(from_sparse):
        raise DataError(
            f"column {source.column!r} has sparse vectors whose indices and values differ in number: {remedy}"
        )
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= width):
        raise DataError(f"column {source.column!r} has sparse vectors with indices outside 0 to {width - 1}: {remedy}")
    position[from_sparse] = indices
    return row, position


def _present(array: pa.Array, source: Source) -> pa.Array:
    source.faults.count_nulls(source.column, array.null_count)
    return array.drop_null() if array.null_count else array


def _lengths(array: pa.Array) -> Array:
    """Return the length of each list, (n,) int64; there must be no nulls."""
    if pa.types.is_fixed_size_list(array.type):
        return np.full(len(array), array.type.list_size, np.int64)
    return np.diff(array.offsets.to_numpy(zero_copy_only=False)).astype(np.int64, copy=False)
