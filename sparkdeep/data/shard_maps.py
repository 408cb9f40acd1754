"""The column files of a shard as memory maps: the manifest's account of them is checked before they are touched."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from sparkdeep.data.arrow import Array, FieldValues, Ragged
from sparkdeep.data.schema import Field, Schema
from sparkdeep.errors import DataError

__all__ = ["SPLITS", "StoredShard", "open_field", "own_files", "will_need"]

SPLITS: Final = ("train", "validation")
_PIECE: Final = 1 << 20
# More than numpy allows in a shape, even where one of its sizes is 0.
_MOST_ELEMENTS: Final = 1 << 56


@dataclass(frozen=True, kw_only=True)
class StoredShard:
    """The contents of a shard's manifest."""

    format: int
    info: dict[str, Any]
    schema: dict[str, Any]
    files: dict[str, int]


def own_files(sizes: dict[str, int], schema: Schema) -> dict[str, int]:
    """Return the files' sizes if they are files of the schema's fields: a manifest names nothing outside its folder."""
    stems = [f"{split}.{field.name}" for split in SPLITS for field in schema.fields]
    known = {f"{stem}{part}.bin" for stem in stems for part in ("", ".values", ".offsets")}
    if odd := sizes.keys() - known:
        raise DataError(f"files {sorted(odd)[:3]!r:.200} belong to no field")
    return sizes


def open_field(directory: Path, split: str, field: Field, rows: int, sizes: Mapping[str, int]) -> FieldValues:
    """Map a field's column of a split; of a ragged field the values and the offsets, (rows + 1,).

    Raises:
        DataError: its files do not have the sizes that its rows need, or its offsets are not ascending.
    """
    dtype = np.dtype("float32" if field.dtype == "decoded" else field.dtype).newbyteorder("<")
    stem = f"{split}.{field.name}"
    if not field.ragged:
        return _map(directory / f"{stem}.bin", dtype, (rows, *(field.shape or ())), sizes)
    if rows == 0:
        return Ragged(np.zeros(0, dtype), np.zeros(1, np.int64))
    offsets = _map(directory / f"{stem}.offsets.bin", np.dtype("<i8"), (rows + 1,), sizes)
    values = _map(directory / f"{stem}.values.bin", dtype, (int(offsets[-1]),), sizes)
    if not _ascending(offsets):
        raise DataError(f"shard file {directory / f'{stem}.offsets.bin'} is damaged: rows do not follow each other")
    return Ragged(values, offsets)


def _ascending(offsets: Array) -> bool:
    """Whether offsets begin with 0 and never fall; in pieces, as there may be as many as rows."""
    pieces = (offsets[start : start + _PIECE + 1] for start in range(0, len(offsets), _PIECE))
    return int(offsets[0]) == 0 and all(bool((piece[1:] >= piece[:-1]).all()) for piece in pieces)


def _map(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    size = math.prod(shape) * dtype.itemsize
    if size != sizes.get(path.name, 0) or math.prod(max(1, n) for n in shape) >= _MOST_ELEMENTS:
        raise DataError(
            f"shard file {path} was written with {sizes.get(path.name, 0)} bytes where {shape} of {dtype} need {size}: "
            "it must be ingested again"
        )
    if size == 0:
        return np.zeros(shape, dtype)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, dtype).reshape(shape)


def will_need(array: Array, start: int, stop: int) -> None:
    """Ask the system to read rows [start, stop) of a mapped array before they are used."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap) or stop <= start or not hasattr(mmap, "MADV_WILLNEED"):
        return  # an empty column has no map
    stride = array.nbytes // len(array)
    first = start * stride // mmap.PAGESIZE * mmap.PAGESIZE
    base.madvise(mmap.MADV_WILLNEED, first, stop * stride - first)
