"""petastorm's codecs, a column at a time: an Arrow column of encoded values to a column of numbers or arrays."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from tokenize import TokenError
from typing import Any, Final

import numpy as np
import pyarrow as pa

from sparkdeep.data.arrow import Array
from sparkdeep.data.petastorm.unischema import UnischemaField
from sparkdeep.errors import ConfigError, DataError

__all__ = ["ARROW_TYPES", "FieldDecoder", "decode_column", "row_bytes"]

# Spark has no unsigned integers and no half-precision floats: these are the smallest of its types that hold every value.
ARROW_TYPES: Final[dict[str, pa.DataType]] = {
    "bool": pa.bool_(),
    "int8": pa.int8(),
    "uint8": pa.int16(),
    "int16": pa.int16(),
    "uint16": pa.int32(),
    "int32": pa.int32(),
    "uint32": pa.int64(),
    "int64": pa.int64(),
    "float16": pa.float32(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "str": pa.string(),
    "bytes": pa.binary(),
    "datetime64": pa.timestamp("us", tz="UTC"),  # an instant, as Spark's timestamp is
}
# The dtypes of the tensors: uint8 is the only unsigned integer that torch computes with.
_TENSORS: Final = {
    **{name: name for name in ("bool", "int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64")},
    "uint16": "int32",
    "uint32": "int64",
}
_MAX_VALUE_BYTES: Final = 1 << 30  # of one decompressed value of unknown shape
_MAX_HEADER_BYTES: Final = 10_000  # numpy's own limit on the headers that it parses
_VARIABLE_BYTES: Final = 8 << 10  # assumed size of a value of unknown shape


def row_bytes(field: UnischemaField) -> int:
    """Return how many bytes one decoded value takes; an estimate where the shape is not fixed."""
    size = {"str": 32, "bytes": 32}.get(field.dtype) or ARROW_TYPES[field.dtype].bit_width // 8 or 1
    return max(size * prod(n for n in field.shape if n is not None), _VARIABLE_BYTES if None in field.shape else 1)


def decode_column(array: pa.Array, field: UnischemaField) -> pa.Array:
    """Decode the stored values of a field with a codec for arrays or images.

    Args:
        array: (rows,) binary; nulls stay nulls.
        field: of the codec "ndarray", "compressed_ndarray" or "image", of a fixed shape or of one dimension.

    Returns:
        (rows,) lists of `ARROW_TYPES[field.dtype]`, nested once for each dimension; plain values for shape ().

    Raises:
        DataError: a value is damaged, or its dtype or shape is not the one in the schema.
        ConfigError: the field holds images and OpenCV is not installed.
    """
    column = _column_of(array, field)
    values = _decode_ragged(column) if None in field.shape else _nested(_decode_fixed(column), field)
    if len(column) == len(array):
        return values
    # take() with a null index gives null.
    places, missing = np.zeros(len(array), np.int64), np.ones(len(array), bool)
    places[column.rows], missing[column.rows] = np.arange(len(column)), False
    return values.take(pa.array(places, mask=missing))


@dataclass(frozen=True)
class FieldDecoder:
    """`decode=` for a column that petastorm encoded. It takes whole columns at a time; other functions take one value."""

    field: UnischemaField

    def __call__(self, data: bytes) -> Array:
        """Return one value, (*shape,)."""
        value: Array = self.rows(pa.array([data], pa.binary()))[0]
        return value

    def rows(self, array: pa.Array) -> Array:
        """Return a column's values, (rows without nulls, *shape), in the smallest dtype that torch computes with.

        Raises:
            DataError: a value is damaged or not of the schema's dtype and shape; values differ in shape; they are not
                numbers.
            ConfigError: the field holds images and OpenCV is not installed.
        """
        field = self.field
        if None in field.shape or field.dtype not in _TENSORS:
            raise DataError(
                f"field {field.name!r} is {field.dtype} of shape {field.shape}: rows of one shape of numbers become "
                "tensors while they are encoded; read it decoded (decode=True), and give collate= for ragged rows"
            )
        return _decode_fixed(_column_of(array, field)).astype(_TENSORS[field.dtype], copy=False)


def _column_of(array: pa.Array, field: UnischemaField) -> _Column:
    view, offsets = _bytes_of(array)
    rows = np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False)) if array.null_count else None
    return _Column(field, view, offsets, np.arange(len(array)) if rows is None else rows)


class _Column:
    """The bytes of a column's values, nulls left out."""

    def __init__(self, field: UnischemaField, view: Array, offsets: Array, rows: Array) -> None:
        self.field = field
        self.view = view  # (bytes,) uint8, of the whole Arrow buffer
        self.starts = offsets[rows]  # (values,) int64
        self.ends = offsets[rows + 1]
        self.rows = rows  # (values,) int64, of the batch
        self.shape: tuple[int, ...] = tuple(size or 0 for size in field.shape)
        self.dtype = None if field.dtype in ("str", "bytes", "datetime64") else np.dtype(field.dtype)

    def __len__(self) -> int:
        return len(self.rows)

    def value(self, at: int) -> Array:
        """Return the bytes of one value, (n,) uint8, without a copy."""
        return self.view[self.starts[at] : self.ends[at]]

    def wrong(self, at: int, why: str) -> DataError:
        field = self.field
        return DataError(
            f"field {field.name!r}, row {self.rows[at]} of a batch: {why}; its schema says {field.dtype} of shape "
            f"{field.shape} by {field.codec_name}. Leave the field out (fields=), or write the dataset again"
        )

    def check(self, at: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        """Check one value's dtype and shape against the schema."""
        kinds = {"str": "U", "bytes": "S", "datetime64": "M"}
        if dtype.newbyteorder("=") != self.dtype if self.dtype is not None else dtype.kind != kinds[self.field.dtype]:
            raise self.wrong(at, f"the value is {dtype}")
        declared = self.field.shape
        if len(shape) != len(declared) or any(n is not None and n != m for n, m in zip(declared, shape, strict=True)):
            raise self.wrong(at, f"the value has shape {shape}")


def _bytes_of(array: pa.Array) -> tuple[Array, Array]:
    """Return a binary column's buffer, (bytes,) uint8, and where values begin and end in it, (rows + 1,) int64."""
    kind = array.type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"a column of {kind} holds no encoded values: petastorm stores arrays and images as binary")
    if len(array) == 0:
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    _, offsets, data = array.buffers()
    wide = np.int64 if pa.types.is_large_binary(kind) else np.int32
    places = np.frombuffer(offsets, wide)[array.offset : array.offset + len(array) + 1]
    bytes_ = np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(0, np.uint8)
    return bytes_, places.astype(np.int64)


def _decode_fixed(column: _Column) -> Array:
    """Return the values as (values, *shape)."""
    if column.field.codec == "image":
        return _images(column)
    together = _same_headers(column) if column.field.codec == "ndarray" else None
    if together is not None:
        return together
    out: Array | None = None
    for at, value in enumerate(_arrays(column)):
        if out is None:
            out = np.empty((len(column), *column.shape), value.dtype.newbyteorder("="))
        if value.dtype.itemsize > out.dtype.itemsize:  # strings, of which numpy keeps the longest's width
            out = out.astype(value.dtype)
        out[at] = value
    return np.zeros((0, *column.shape), _empty(column)) if out is None else out


def _same_headers(column: _Column) -> Array | None:
    """Return all values at once where they lie end to end with one header; None where they do not."""
    count = len(column)
    if count == 0:
        return None
    size = int(column.ends[0] - column.starts[0])
    start = int(column.starts[0])
    if (
        not bool((column.starts == start + size * np.arange(count)).all())
        or int(column.ends[-1]) != start + size * count
    ):
        return None
    table = column.view[start : start + size * count].reshape(count, size)  # (values, bytes) uint8
    header = _Header(column, 0, table[0])
    if (
        header.fortran
        or header.dtype.kind in "US"
        or not bool((table[:, : header.size] == table[0, : header.size]).all())
    ):
        return None
    payload = np.ascontiguousarray(table[:, header.size :])
    values = payload.reshape(-1).view(header.dtype).reshape(count, *header.shape)
    return values.astype(header.dtype.newbyteorder("="), copy=False)


class _Header:
    """The header of one value in numpy's own format, checked against the schema."""

    def __init__(self, column: _Column, at: int, value: Array) -> None:
        stream = io.BytesIO(value[: _MAX_HEADER_BYTES + 16].tobytes())
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version} of the format")
            shape, self.fortran, self.dtype = read(stream)
        except (ValueError, TypeError, SyntaxError, TokenError, MemoryError, RecursionError, EOFError) as error:
            raise column.wrong(at, f"the value is no numpy array ({str(error)[:100]})") from None
        self.shape: tuple[int, ...] = tuple(shape)
        column.check(at, self.dtype, self.shape)
        self.size = stream.tell()
        if len(value) - self.size != prod(self.shape) * self.dtype.itemsize:
            raise column.wrong(at, f"{len(value) - self.size} bytes are stored of shape {self.shape} of {self.dtype}")
        self.data = value[: self.size].tobytes()


def _arrays(column: _Column) -> Iterator[Array]:
    """Yield the values one after the other, checked against the schema."""
    known: dict[bytes, _Header] = {}
    for at in range(len(column)):
        value = column.value(at)
        if column.field.codec == "compressed_ndarray":
            value = _unzipped(column, at, value)
        # The first bytes hold the header's length, so a header that was seen before is recognized without parsing it.
        size = 10 + int.from_bytes(value[8:10].tobytes(), "little") if len(value) > 10 and value[6] == 1 else 0
        header = known.get(value[:size].tobytes()) if size else None
        if header is None or len(value) - header.size != prod(header.shape) * header.dtype.itemsize:
            header = _Header(column, at, value)
            known[header.data] = header
        payload = np.ascontiguousarray(value[header.size :])
        numbers = payload.view(header.dtype) if header.dtype.itemsize else np.zeros(prod(header.shape), header.dtype)
        yield numbers.reshape(header.shape, order="F" if header.fortran else "C")


def _unzipped(column: _Column, at: int, value: Array) -> Array:
    """Return the only array in a file of numpy's zip format, as bytes."""
    bound = _MAX_VALUE_BYTES
    if None not in column.shape and column.dtype is not None and None not in column.field.shape:
        bound = prod(column.shape) * column.dtype.itemsize + _MAX_HEADER_BYTES
    try:
        with zipfile.ZipFile(io.BytesIO(value.tobytes())) as archive:
            info = archive.getinfo("arr.npy")
            if info.file_size > bound:
                raise column.wrong(at, f"the value unpacks to {info.file_size} bytes")
            return np.frombuffer(archive.read(info), np.uint8)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise column.wrong(at, f"the value is no compressed numpy array ({str(error)[:100]})") from None


def _images(column: _Column) -> Array:
    """Return the images as (values, height, width[, 3]), in the order red, green, blue."""
    cv2 = _opencv()
    channels = len(column.shape) == 3
    out = np.empty((len(column), *column.shape), column.dtype)
    for at in range(len(column)):
        value = column.value(at)
        try:
            image = cv2.imdecode(value, cv2.IMREAD_UNCHANGED) if len(value) else None
        except cv2.error as error:
            raise column.wrong(at, f"OpenCV cannot decode the value ({str(error)[:100]})") from None
        if image is None:
            raise column.wrong(at, "the value is no image that OpenCV reads")
        column.check(at, image.dtype, image.shape)
        if channels:
            cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out[at])
        else:
            out[at] = image
    return out


def _opencv() -> Any:
    try:
        import cv2  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ConfigError(
            "images that petastorm encoded are decoded by OpenCV, as petastorm does, and it is not installed on "
            "executors: install sparkdeep[images], or leave the image fields out (fields=)"
        ) from None
    return cv2


def _decode_ragged(column: _Column) -> pa.Array:
    """Return values of one dimension and of different length as lists."""
    values = list(_arrays(column))
    lengths = np.fromiter((len(value) for value in values), np.int64, len(values))
    flat = np.concatenate(values) if values else np.zeros(0, _empty(column))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(_narrow(column.field, offsets)), _elements(flat, column.field))


def _nested(values: Array, field: UnischemaField) -> pa.Array:
    """Return (rows, *shape) as lists of lists, innermost last."""
    array = _elements(values.reshape(-1), field)
    for axis in range(values.ndim - 1, 0, -1):
        size = values.shape[axis]
        offsets = np.arange(prod(values.shape[:axis]) + 1, dtype=np.int64) * size
        array = pa.ListArray.from_arrays(pa.array(_narrow(field, offsets)), array)
    return array


def _narrow(field: UnischemaField, offsets: Array) -> Array:
    if int(offsets[-1]) > np.iinfo(np.int32).max:
        raise DataError(
            f"field {field.name!r} decodes to {offsets[-1]} values in one batch, and Arrow lists hold 2147483647: "
            "lower spark.sql.execution.arrow.maxRecordsPerBatch"
        )
    return offsets.astype(np.int32)


def _elements(flat: Array, field: UnischemaField) -> pa.Array:
    """Return (n,) values as Arrow's type for Spark."""
    kind = ARROW_TYPES[field.dtype]
    if flat.dtype.kind in "US":
        return pa.array(flat.tolist(), kind)
    if flat.dtype.kind == "M":
        return pa.array(flat.astype("datetime64[us]"), kind)
    narrower: Callable[[], Any] = kind.to_pandas_dtype
    return pa.array(flat if flat.dtype == bool else flat.astype(narrower(), copy=False), kind)


def _empty(column: _Column) -> Any:
    return column.dtype if column.dtype is not None else {"str": "U1", "bytes": "S1"}.get(column.field.dtype, "M8[us]")
