"""Rows of numpy values as one Arrow column: scalars, or nested lists whose numbers are never Python objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sparkdeep.errors import DataError

__all__ = ["column_of"]

_Values = npt.NDArray[Any] | Sequence[Any]


def column_of(values: _Values, kind: pa.DataType, ndim: int, name: str) -> pa.Array:
    """Make an Arrow column of one value per row.

    Args:
        values: (rows, ...) in one array, or a list of scalars or arrays, where None is a null.
        kind: Arrow type of the element.
        ndim: dimensions of one row; 0 for scalars.
        name: of the column, for messages.

    Returns:
        (rows,) of `kind`, or of lists nested `ndim` deep.

    Raises:
        DataError: a row has a different number of dimensions, or an element does not fit `kind`.
    """
    try:
        if ndim == 0:
            return _scalars(values, kind)
        if isinstance(values, np.ndarray) and values.dtype != object:
            if values.ndim != ndim + 1:
                raise ValueError(f"an array of {values.ndim - 1} dimension(s) a row")
            return _lists(
                values.reshape(-1), np.tile(np.array(values.shape[1:], np.int64), (len(values), 1)), kind, None
            )
        missing = np.array([value is None for value in values], bool)
        arrays = [np.asarray(value) for value in values if value is not None]
        if any(one.ndim != ndim for one in arrays):
            raise ValueError(f"an array of {next(one.ndim for one in arrays if one.ndim != ndim)} dimension(s)")
        flat = np.concatenate([one.reshape(-1) for one in arrays]) if arrays else np.zeros(0, kind.to_pandas_dtype())
        present = iter(arrays)
        shapes = [(0,) * ndim if null else next(present).shape for null in missing]
        sizes = np.array(shapes, np.int64).reshape(len(shapes), ndim)
        return _lists(flat, sizes, kind, missing if missing.any() else None)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise DataError(
            f"column {name!r} cannot be read as {ndim}-dimensional {kind}: {error}. The dataset's schema says otherwise; leave "
            "the field out through fields=, or write the dataset anew."
        ) from error


def _scalars(values: _Values, kind: pa.DataType) -> pa.Array:
    if isinstance(values, np.ndarray) and values.dtype != object:
        # pandas, through which petastorm reads Parquet, has NaN for the nulls of integers.
        lost = np.isnan(values) if values.dtype.kind == "f" and pa.types.is_integer(kind) else None
        if lost is not None and lost.any():
            return pa.array(np.where(lost, 0, values).astype(np.int64), kind, mask=lost)
        return _elements(values, kind)
    if pa.types.is_floating(kind):
        values = [None if value is None else float(value) for value in values]
    elif pa.types.is_binary(kind):
        values = [None if value is None else bytes(value) for value in values]
    else:
        values = [value.item() if isinstance(value, np.generic | np.ndarray) else value for value in values]
    return pa.array(values, kind)


def _elements(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_binary(kind):
        return pa.array(values.tolist(), kind)
    return pa.array(values.astype(kind.to_pandas_dtype(), casting="safe", copy=False))


def _lists(
    flat: npt.NDArray[Any], sizes: npt.NDArray[np.int64], kind: pa.DataType, missing: npt.NDArray[np.bool_] | None
) -> pa.Array:
    """Wrap all elements of all rows, end to end, into lists: one level per axis, the innermost first.

    Args:
        flat: (elements,).
        sizes: (rows, ndim), each row's shape.
        kind: of the elements.
        missing: (rows,), or None where no row is null.
    """
    column = _elements(flat, kind)
    for axis in reversed(range(sizes.shape[1])):
        lengths = np.repeat(sizes[:, axis], sizes[:, :axis].prod(axis=1))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        mask = pa.array(missing) if missing is not None and axis == 0 else None
        column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), column, mask=mask)
    return column
