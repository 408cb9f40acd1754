"""Datasets that petastorm wrote, as DataFrames: the schema from its metadata, the values by its codecs."""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from sparkdeep.checks import hint
from sparkdeep.data.petastorm.codecs import ARROW_TYPES, FieldDecoder, decode_column, row_bytes
from sparkdeep.data.petastorm.unischema import Unischema, UnischemaField, read_metadata
from sparkdeep.errors import ConfigError, DataError
from sparkdeep.spark.session.hadoop import HadoopStore
from sparkdeep.spark.session.types import quoted
from sparkdeep.storage.opening import Store, open_store

__all__ = ["decoders", "read", "read_schema"]

_METADATA: Final = "_common_metadata"
_METADATA_KEY: Final = "sparkdeep.petastorm"
_MAX_METADATA_BYTES: Final = 64 << 20
_SLICE_BYTES: Final = 4 << 20  # decoded values of a field that are in flight together
_MAX_FUNCTIONS: Final = 3  # for each of them Spark starts one Python worker per task
_SPARK_TYPES: Final[dict[str, T.DataType]] = {
    "bool": T.BooleanType(),
    "int8": T.ByteType(),
    "uint8": T.ShortType(),
    "int16": T.ShortType(),
    "uint16": T.IntegerType(),
    "int32": T.IntegerType(),
    "uint32": T.LongType(),
    "int64": T.LongType(),
    "float16": T.FloatType(),
    "float32": T.FloatType(),
    "float64": T.DoubleType(),
    "str": T.StringType(),
    "bytes": T.BinaryType(),
    "datetime64": T.TimestampType(),
}
_ENCODED: Final = frozenset({"ndarray", "compressed_ndarray", "image"})


def read_schema(spark: SparkSession, url: str) -> Unischema:
    """Return the schema of the dataset at `url`; raises what `read` raises."""
    return _read_metadata(spark, url)[0]


def read(spark: SparkSession, url: str, fields: Sequence[str] | None = None, *, decode: bool = True) -> DataFrame:
    """Return the dataset at `url` as a DataFrame; see `sparkdeep.petastorm.read`."""
    schema, stored_columns = _read_metadata(spark, url)
    chosen = _choose(schema, fields, url)
    frame = _stored(spark, url, chosen, stored_columns)
    types = {field.name: field.dataType for field in frame.schema.fields}
    if missing := [field.name for field in chosen if field.name not in types]:
        raise DataError(
            f"{url} has no columns for the fields {missing} of its schema: the metadata is of another dataset; write "
            "it again with petastorm-generate-metadata, or leave the fields out (fields=)"
        )
    for field in chosen:
        _check(field, types[field.name], decode=decode)
    if not decode:
        return frame.select(*[_encoded_or_plain(field, types[field.name]) for field in chosen])
    encoded = sum(field.codec in _ENCODED for field in chosen)
    if not encoded:
        return frame.select(*[_plain(field, types[field.name]) for field in chosen])
    if encoded > _MAX_FUNCTIONS:
        return _decoded_by_rows(frame, chosen, types)
    try:
        from pyspark.sql.functions import ArrowUDFType, arrow_udf
    except ImportError:  # before Spark 4.1
        return _decoded_by_rows(frame, chosen, types)
    columns = []
    for field in chosen:
        if field.codec in _ENCODED:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it prefers type hints, and the type says it directly
                function = arrow_udf(_column_function(field), _spark_type(field), ArrowUDFType.SCALAR_ITER)
            columns.append(function(F.col(quoted(field.name))).alias(field.name))
        else:
            columns.append(_plain(field, types[field.name]))
    return frame.select(*columns)


def decoders(frame: DataFrame) -> dict[str, FieldDecoder]:
    """Return `decode=` for the encoded columns of a DataFrame that `read(..., decode=False)` gave.

    Raises:
        DataError: the DataFrame has no such column.
    """
    found = {}
    for column in frame.schema.fields:
        if (text := (column.metadata or {}).get(_METADATA_KEY)) is not None:
            value = json.loads(text)
            found[column.name] = FieldDecoder(UnischemaField(**{**value, "shape": tuple(value["shape"])}))
    if not found:
        raise DataError(
            f"none of the columns {frame.columns} is one that petastorm encoded: read the dataset with decode=False, "
            "and keep the columns as they are (a cast or a function loses what they are)"
        )
    return found


def _read_metadata(spark: SparkSession, url: str) -> tuple[Unischema, frozenset[str]]:
    if not isinstance(url, str) or not url:
        raise ConfigError(f"url={url!r}: the folder of one dataset is needed, such as file:///data/set or s3a://a/b")
    where = f"{url.rstrip('/')}/{_METADATA}"
    # As Spark will open the rows: through its file systems and with its credentials, where the session gives access to them.
    direct = url.startswith("file:") or getattr(spark, "_jvm", None) is None
    store: Store = open_store(url) if direct else HadoopStore(spark, url)
    try:
        data = store.read(_METADATA, max_bytes=_MAX_METADATA_BYTES)
    except FileNotFoundError:
        raise DataError(
            f"{url} has no file {_METADATA}, where petastorm keeps the schema: check the path; if petastorm wrote the "
            "dataset, make the file with petastorm-generate-metadata; read other Parquet with spark.read.parquet"
        ) from None
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise DataError(
            f"{where} is larger than any schema ({error.strerror}): write it again with petastorm-generate-metadata"
        ) from None
    return read_metadata(data, where=where)


def _choose(schema: Unischema, fields: Sequence[str] | None, url: str) -> list[UnischemaField]:
    by_name = {field.name: field for field in schema.fields}
    if fields is None:
        return list(schema.fields)
    if isinstance(fields, str) or not fields or not all(isinstance(name, str) for name in fields):
        raise ConfigError(f"fields={fields!r}: a list of field names is needed, or None for all")
    for name in fields:
        if name not in by_name:
            near = hint(name, by_name)
            raise DataError(f"{url} has no field {name!r}.{near} Its fields are {sorted(by_name)}; name one of them")
    return [by_name[name] for name in dict.fromkeys(fields)]


def _stored(
    spark: SparkSession, url: str, fields: Iterable[UnischemaField], stored_columns: frozenset[str]
) -> DataFrame:
    """Return the columns as Parquet and the names of partition folders have them."""
    frame = spark.read.parquet(url)
    strings = {field.name for field in fields if field.dtype == "str" and field.name not in stored_columns}
    guessed = [f for f in frame.schema.fields if f.name in strings and not isinstance(f.dataType, T.StringType)]
    if not guessed:
        return frame
    # Spark takes the folder `day=007` for a number; the schema says that it is text.
    names = {field.name for field in guessed}
    columns = [T.StructField(f.name, T.StringType()) if f.name in names else f for f in frame.schema.fields]
    return spark.read.schema(T.StructType(columns)).parquet(url)


def _check(field: UnischemaField, stored: T.DataType, *, decode: bool) -> None:
    """Refuse a field that has no column of its own kind in Spark."""

    def refused(why: str) -> DataError:
        return DataError(
            f"field {field.name!r} ({field.dtype}, shape {field.shape}, {field.codec_name}, stored as "
            f"{stored.simpleString()}) cannot be read: {why}. Leave it out (fields=), or decode the stored column of "
            "spark.read.parquet with a function of your own"
        )

    if field.codec is None:
        raise refused(f"the codec {field.codec_name} is not one of petastorm's that are known here")
    if field.codec in _ENCODED:
        if not isinstance(stored, T.BinaryType):
            raise refused("an encoded value is binary")
        if field.dtype not in _SPARK_TYPES:
            raise refused(f"arrays of {field.dtype} have no type in Spark")
        if None in field.shape and len(field.shape) > 1 and decode:
            raise refused("arrays of several dimensions must have one shape in all rows")
        if field.codec == "image" and (
            len(field.shape) not in (2, 3)
            or field.shape[2:] not in ((), (3,))
            or field.dtype not in ("uint8", "uint16")
        ):
            raise refused("images are uint8 or uint16 of shape (height, width) or (height, width, 3)")
    elif field.shape == ():
        if not _scalar_fits(field.dtype, stored):
            raise refused("no value of that kind can be made of what is stored")
    elif not (isinstance(stored, T.ArrayType) and len(field.shape) == 1 and field.dtype in _SPARK_TYPES):
        raise refused("an array without a codec for arrays must be stored as a list of one dimension")


def _scalar_fits(dtype: str, stored: T.DataType) -> bool:
    if dtype == "decimal":
        return isinstance(stored, T.DecimalType)
    if dtype in ("datetime64", "date"):
        return isinstance(stored, T.TimestampType | T.TimestampNTZType | T.DateType)
    if dtype in ("str", "bytes"):
        return isinstance(stored, T.StringType | T.BinaryType) or (dtype == "str" and isinstance(stored, T.AtomicType))
    return dtype in _SPARK_TYPES and isinstance(stored, T.NumericType | T.BooleanType)


def _plain(field: UnischemaField, stored: T.DataType) -> Column:
    """The column of a field that needs no decoding, in Spark's type for it."""
    column = F.col(quoted(field.name))
    if field.dtype in ("decimal", "datetime64", "date") or (field.dtype == "bytes" and field.shape == ()):
        return column
    wanted: T.DataType = _SPARK_TYPES[field.dtype]
    if field.shape != ():
        wanted = T.ArrayType(wanted)
    return column if stored == wanted else column.cast(wanted).alias(field.name)


def _encoded_or_plain(field: UnischemaField, stored: T.DataType) -> Column:
    """The column as it is stored, with what it takes to decode it as the column's metadata."""
    if field.codec not in _ENCODED:
        return _plain(field, stored)
    return F.col(quoted(field.name)).alias(field.name, metadata={_METADATA_KEY: json.dumps(asdict(field))})


def _spark_type(field: UnischemaField) -> T.DataType:
    kind = _SPARK_TYPES[field.dtype]
    for _ in field.shape:
        kind = T.ArrayType(kind)
    return kind


def _slice_rows(field: UnischemaField) -> int:
    return max(1, _SLICE_BYTES // row_bytes(field))


def _column_function(field: UnischemaField) -> Any:
    """What decodes a column, a few rows at a time: a batch of Spark's 10,000 rows of images would not fit in memory."""
    step = _slice_rows(field)

    # Spark looks at a function's own name and number of arguments, which a partial has not.
    def decode(batches: Any) -> Any:
        for array in batches:
            for start in range(0, max(len(array), 1), step):
                yield decode_column(array.slice(start, step), field)

    return decode


def _decoded_by_rows(frame: DataFrame, fields: list[UnischemaField], types: dict[str, T.DataType]) -> DataFrame:
    """Decode in one pass over whole rows: what is not needed must be left out by fields=."""
    plain = frame.select(*[F.col(quoted(f.name)) if f.codec in _ENCODED else _plain(f, types[f.name]) for f in fields])
    columns = [
        T.StructField(field.name, _spark_type(field)) if field.codec in _ENCODED else column
        for field, column in zip(fields, plain.schema.fields, strict=True)
    ]
    step = min(_slice_rows(field) for field in fields if field.codec in _ENCODED)

    def decode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for whole in batches:
            for start in range(0, max(whole.num_rows, 1), step):
                batch = whole.slice(start, step)
                columns = [
                    decode_column(batch.column(at), field) if field.codec in _ENCODED else batch.column(at)
                    for at, field in enumerate(fields)
                ]
                yield pa.RecordBatch.from_arrays(columns, names=[field.name for field in fields])

    return plain.mapInArrow(decode, T.StructType(columns))


assert set(_SPARK_TYPES) == set(ARROW_TYPES), "each type of values has one in Arrow and one in Spark"
