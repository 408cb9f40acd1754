"""A petastorm schema as plain descriptions, from the pickle that petastorm keeps beside a dataset."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparkdeep.data.petastorm.pickles import Global, Made, read_pickle
from sparkdeep.errors import DataError

__all__ = ["Codec", "Unischema", "UnischemaField", "read_metadata", "read_unischema"]

KEY: Final = b"dataset-toolkit.unischema.v1"

Codec = Literal["none", "scalar", "ndarray", "compressed_ndarray", "image"]


@dataclass(frozen=True, kw_only=True)
class UnischemaField:
    """One field: what its values are, and how they are stored."""

    name: str
    """Of the field and of its Parquet or partition column."""
    dtype: str
    """numpy's name (uint8, float32, str, bytes, datetime64, ...), "decimal", or the name of another Python class."""
    shape: tuple[int | None, ...]
    """Of one value; None is a dimension of any length; () is a scalar."""
    nullable: bool
    """Whether values may be missing."""
    codec: Codec | None
    """How a value is stored; "none": as Parquet stores it; None: the codec is not known."""
    codec_name: str
    """The codec's class, for messages; an image codec with its format."""


@dataclass(frozen=True, kw_only=True)
class Unischema:
    """All fields of a dataset, in the schema's order."""

    name: str
    """What the writer called the schema."""
    fields: tuple[UnischemaField, ...]
    """The fields, at least one."""


def read_metadata(data: bytes, *, where: str) -> tuple[Unischema, frozenset[str]]:
    """Return the schema in a `_common_metadata` file, and the columns that the Parquet files themselves hold.

    Args:
        data: the file's bytes.
        where: its name, for messages.

    Raises:
        DataError: it is no Parquet metadata, holds no schema of petastorm, or one that is refused.
    """
    remedy = (
        "if petastorm wrote the dataset, write its metadata with petastorm-generate-metadata; read other Parquet with "
        "spark.read.parquet"
    )
    try:
        metadata = pq.read_metadata(io.BytesIO(data))
        stored, columns = metadata.metadata or {}, frozenset(metadata.schema.to_arrow_schema().names)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{where} is no Parquet metadata ({str(error)[:200]}): {remedy}") from None
    keys = [key for key in stored if key == KEY] or [key for key in stored if re.search(rb"\.unischema\.v\d+$", key)]
    if not keys:
        raise DataError(f"{where} holds no petastorm schema (the key {KEY.decode()!r}): {remedy}")
    return read_unischema(stored[keys[0]], where=f"{keys[0].decode(errors='replace')} in {where}"), columns


def read_unischema(data: bytes, *, where: str) -> Unischema:
    """Return the schema that a pickled Unischema describes; nothing of the pickle is run.

    Args:
        data: the pickle, protocol 0 to 5, of any version of petastorm, also under its former package names.
        where: what the bytes are, for messages.

    Raises:
        DataError: the pickle is damaged, names what no schema needs, or describes no schema.
    """
    return _Reader(where).unischema(read_pickle(data, allowed=_allowed, where=where))


_PACKAGES: Final = (
    "petastorm",
    "av.experimental.deepdrive.dataset_toolkit",
    "av.ml.dataset_toolkit",
    "dataset_toolkit",
)
_SCHEMAS: Final = frozenset(f"{package}.unischema" for package in _PACKAGES)
_CODECS: Final = frozenset(f"{package}.codecs" for package in _PACKAGES)
_BUILTINS: Final = frozenset({"builtins", "__builtin__"})
_COPYREG: Final = frozenset({"copyreg", "copy_reg"})
_SCALARS: Final = frozenset(
    [
        *["bool_", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"],
        *["float16", "float32", "float64", "complex64", "complex128", "datetime64", "timedelta64"],
        *["str_", "unicode_", "string_", "bytes_", "object_", "intc", "uintc", "longlong", "ulonglong"],
    ]
)
_ALIASES: Final = {
    "bool_": "bool",
    "unicode_": "str",
    "str_": "str",
    "string_": "bytes",
    "bytes_": "bytes",
    "object_": "object",
    "intc": "int32",
    "uintc": "uint32",
    "longlong": "int64",
    "ulonglong": "uint64",
}
_PYTHON: Final = {
    "str": "str",
    "unicode": "str",
    "bytes": "bytes",
    "int": "int64",
    "long": "int64",
    "float": "float64",
    "bool": "bool",
    "object": "object",
    "tuple": "tuple",
    "list": "list",
    "dict": "dict",
}
_NUMPY_PARTS: Final = {
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
}
_OTHERS: Final = {
    ("collections", "OrderedDict"): "",
    ("decimal", "Decimal"): "decimal",
    ("datetime", "datetime"): "datetime64",
    ("datetime", "date"): "date",
    ("pyspark.serializers", "_restore"): "",
    ("_codecs", "encode"): "",
}
_CODEC_KINDS: Final[dict[str, Codec]] = {
    "ScalarCodec": "scalar",
    "NdarrayCodec": "ndarray",
    "CompressedNdarrayCodec": "compressed_ndarray",
    "CompressedImageCodec": "image",
}
_CLASS_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,80}")
_DTYPE_CODE: Final = re.compile(r"[<>|=]?([biufcSUM][0-9]{0,6}|\?)(\[[a-zA-Z]{1,3}\])?")


def _allowed(found: Global) -> bool:
    module, name = found.module, found.name
    if not _CLASS_NAME.fullmatch(name):
        return False
    return (
        (module in _SCHEMAS and name in ("Unischema", "UnischemaField"))
        or module in _CODECS
        or (module in _BUILTINS and name in _PYTHON)
        or (module in _COPYREG and name in ("_reconstructor", "__newobj__"))
        or (module == "numpy" and name in _SCALARS)
        or (module, name) in _NUMPY_PARTS
        or (module == "pyspark.sql.types" and name.endswith("Type"))
        or (module, name) in _OTHERS
    )


class _Reader:
    """Compares records with what petastorm writes; `where` is for messages."""

    def __init__(self, where: str) -> None:
        self._where = where

    def unischema(self, value: Any) -> Unischema:
        if self._class_of(value, _SCHEMAS) != "Unischema" or not isinstance(value.state, dict):
            raise self._unlike("it is no Unischema")
        name, fields = value.state.get("_name"), value.state.get("_fields")
        pairs = self._pairs(fields)
        if type(name) is not str or not pairs:
            raise self._unlike("the Unischema has no name or no fields")
        found = tuple(self._field(field) for _, field in pairs)
        if len({field.name for field in found}) != len(found):
            raise self._unlike("a field occurs twice")
        return Unischema(name=name, fields=found)

    def _unlike(self, why: str) -> DataError:
        return DataError(
            f"{self._where} describes no petastorm schema ({why}), and nothing of it was run: write the metadata again "
            "with petastorm-generate-metadata"
        )

    def _class_of(self, value: Any, modules: frozenset[str]) -> str | None:
        """Return the name of the class, in one of the modules, of which a record is an instance."""
        if not isinstance(value, Made):
            return None
        made, arguments = value.function, value.arguments
        if made.module in _COPYREG and arguments and isinstance(arguments[0], Global):
            made = arguments[0]
        return made.name if made.module in modules else None

    def _pairs(self, fields: Any) -> list[tuple[Any, Any]]:
        """Return the items of an OrderedDict or dict."""
        if isinstance(fields, dict):
            return list(fields.items())
        if not isinstance(fields, Made) or fields.function != Global("collections", "OrderedDict"):
            raise self._unlike("its fields are no OrderedDict")
        pairs = list(fields.items)
        if len(fields.arguments) == 1 and isinstance(fields.arguments[0], list):
            given = [tuple(pair) if isinstance(pair, list | tuple) else () for pair in fields.arguments[0]]
            if any(len(pair) != 2 for pair in given):
                raise self._unlike("its fields are no pairs")
            pairs = [(pair[0], pair[1]) for pair in given] + pairs
        elif fields.arguments:
            raise self._unlike("its fields are no OrderedDict")
        return pairs

    def _field(self, value: Any) -> UnischemaField:
        name, dtype, shape, codec, nullable = self._field_values(value)
        if type(name) is not str or not name:
            raise self._unlike("a field has no name")
        kind, codec_name = self._codec(codec, name)
        return UnischemaField(
            name=name,
            dtype=self._dtype(dtype, name),
            shape=self._shape(shape, name),
            nullable=bool(nullable) if type(nullable) in (bool, int) else False,
            codec=kind,
            codec_name=codec_name,
        )

    def _field_values(self, value: Any) -> tuple[Any, ...]:
        """Return name, dtype, shape, codec and nullable of a namedtuple, in whichever way it was pickled."""
        if not isinstance(value, Made):
            raise self._unlike("a field is no UnischemaField")
        given: Any = value.arguments
        if value.function.module in _COPYREG and given and isinstance(given[0], Global):
            if given[0].module in _SCHEMAS and given[0].name == "UnischemaField":
                # _reconstructor(class, tuple, values), or __newobj__(class, *values)
                given = given[2] if value.function.name == "_reconstructor" and len(given) == 3 else given[1:]
            else:
                given = None
        elif value.function == Global("pyspark.serializers", "_restore"):
            # Spark before 3.3 pickled every namedtuple by its name, its fields and its values.
            given = given[2] if len(given) == 3 and given[0] == "UnischemaField" else None
        elif value.function.module not in _SCHEMAS or value.function.name != "UnischemaField":
            given = None
        if not isinstance(given, tuple | list) or not 3 <= len(given) <= 5:
            raise self._unlike("a field is no UnischemaField")
        return (*given, *(None, False)[len(given) - 3 :])

    def _shape(self, value: Any, name: str) -> tuple[int | None, ...]:
        if value is None:
            return ()
        if not isinstance(value, tuple | list) or len(value) > 32:
            raise self._unlike(f"field {name!r} has no shape")
        sizes = [self._integer(size) for size in value]
        if any(size is not None and (type(size) is not int or not 0 <= size < 1 << 40) for size in sizes):
            raise self._unlike(f"the shape of field {name!r} is no tuple of sizes")
        return tuple(sizes)

    def _integer(self, value: Any) -> Any:
        """Return a numpy integer's record as the number; anything else as it is."""
        if not isinstance(value, Made) or value.function.name != "scalar" or len(value.arguments) != 2:
            return value
        dtype, data = self._plain_dtype(value.arguments[0]), value.arguments[1]
        if isinstance(data, Made) and data.function == Global("_codecs", "encode") and data.arguments:
            data = data.arguments[0]
        if isinstance(data, str):
            data = data.encode("latin-1", errors="replace")
        if dtype is None or dtype.kind not in "iu" or not isinstance(data, bytes) or len(data) != dtype.itemsize:
            return value
        return int(np.frombuffer(data, dtype)[0])

    def _plain_dtype(self, value: Any) -> np.dtype[Any] | None:
        """Return the numpy dtype of a pickled dtype; None for anything else."""
        if not isinstance(value, Made) or value.function != Global("numpy", "dtype") or not value.arguments:
            return None
        code = value.arguments[0]
        if isinstance(code, Global):
            if code.module != "numpy" or code.name not in _SCALARS:
                return None
            return np.dtype(_ALIASES.get(code.name, code.name))
        code = code.decode("latin-1") if isinstance(code, bytes) else code
        if type(code) is not str or not _DTYPE_CODE.fullmatch(code):
            return None
        try:
            return np.dtype(code)
        except (TypeError, ValueError):
            return None

    def _dtype(self, value: Any, name: str) -> str:
        if isinstance(value, Global):
            if value.module == "numpy" and value.name in _SCALARS:
                return _ALIASES.get(value.name, value.name)
            if value.module in _BUILTINS:
                return _PYTHON[value.name]
            return _OTHERS.get((value.module, value.name)) or str(value)
        dtype = self._plain_dtype(value)
        if dtype is None:
            raise self._unlike(f"field {name!r} has no numpy type")
        return {"U": "str", "S": "bytes", "M": "datetime64"}.get(dtype.kind, dtype.name)

    def _codec(self, value: Any, name: str) -> tuple[Codec | None, str]:
        if value is None:
            return "none", "no codec"
        found = self._class_of(value, _CODECS)
        if found is None:
            raise self._unlike(f"field {name!r} has no codec of petastorm")
        kind = _CODEC_KINDS.get(found)
        if kind == "image":
            image = value.state.get("_image_codec") if isinstance(value.state, dict) else None
            if type(image) is not str or not re.fullmatch(r"\.[a-z0-9]{1,8}", image):
                raise self._unlike(f"the image codec of field {name!r} has no format")
            return kind, f"{found}({image[1:]!r})"
        return kind, found
