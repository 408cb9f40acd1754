"""Datasets of petastorm: `read(spark, url)` is a DataFrame, without petastorm; `open(url)` lets replicas read by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sparkdeep.data.petastorm.codecs import FieldDecoder
    from sparkdeep.data.petastorm.unischema import Unischema
    from sparkdeep.spark.ingest.petastorm_source import PetastormSource

__all__ = ["decoders", "open", "read", "read_schema"]


def read(spark: Any, url: str, fields: Sequence[str] | None = None, *, decode: bool = True) -> Any:
    """Return the dataset that petastorm wrote at `url` as a DataFrame with one column a field.

    petastorm need not be installed. Its schema is a pickle beside the rows: it is read opcode by opcode, and nothing
    of it is run. Values are petastorm's own: unsigned integers come in the next larger type (uint8 as smallint, uint16
    as int, uint32 as bigint), float16 as float, arrays as arrays of arrays of the field's shape, datetime64 as
    timestamp, decimals and text as they are stored. Missing values are null, also where petastorm has NaN for them.

    Args:
        spark: a SparkSession. From Spark 4.1 on, with at most three array and image fields, a column that is not used
            is neither read nor decoded; otherwise leave it out by `fields`.
        url: the dataset's folder, as `spark.read.parquet` takes it.
        fields: names of the fields to read, in this order; None reads all.
        decode: False leaves arrays and images encoded, as binary columns. Images and large arrays then pass through
            Spark at a small part of the cost, and `TorchEstimator(decode=petastorm.decoders(frame))` decodes them
            where they are trained on; uint8 stays uint8.

    Raises:
        DataError: there is no metadata of petastorm; it is damaged, or names what no schema needs; a field is unknown,
            or has no type in Spark (arrays of several dimensions whose shape varies, unknown codecs). While rows
            are read: a value is damaged or not of the schema's dtype and shape.
        ConfigError: `url` or `fields` are of the wrong kind; executors lack OpenCV for images (sparkdeep[images]).
    """
    from sparkdeep.spark.ingest import petastorm_native

    return petastorm_native.read(spark, url, fields, decode=decode)


def decoders(frame: Any) -> dict[str, FieldDecoder]:
    """Return `decode=` for the encoded columns of a DataFrame that `read(..., decode=False)` gave.

    Raises:
        DataError: no column of the DataFrame is one.
    """
    from sparkdeep.spark.ingest import petastorm_native

    return petastorm_native.decoders(frame)


def read_schema(spark: Any, url: str) -> Unischema:
    """Return the schema of the dataset at `url`: name, dtype, shape, codec and nullable of each field.

    Raises:
        DataError: as of `read`.
    """
    from sparkdeep.spark.ingest import petastorm_native

    return petastorm_native.read_schema(spark, url)


def open(
    url: str | Sequence[str],
    *,
    reader: Literal["make_reader", "make_batch_reader"] = "make_reader",
    fields: Sequence[str] | None = None,
    timeout_s: float = 300.0,
    **options: Any,
) -> PetastormSource:
    """Name a dataset that replicas read through petastorm's own reader; `TorchEstimator.fit` takes the result.

    Row groups are dealt to replicas whole: number i, in petastorm's order, goes to replica i % num_workers. Each row is
    read once, into the replica's shard; the estimator shuffles there. petastorm must be installed, which needs pyarrow
    14 or older. It unpickles the schema that is stored with a dataset, so open only datasets that you trust.

    Args:
        url: folder of the dataset, with its scheme, or a list of Parquet files.
        reader: "make_reader" for datasets that petastorm wrote, "make_batch_reader" for other Parquet.
        fields: those that may be used; None for every field that a tensor can be made of.
        timeout_s: a reader that gives nothing for so long has failed.
        **options: further arguments of that reader, such as predicate, transform_spec, storage_options, workers_count.

    Raises:
        ConfigError: a setting is unknown, or set by sparkdeep itself.
    """
    from sparkdeep.spark.ingest.petastorm_source import open_source

    return open_source(url, reader=reader, fields=fields, timeout_s=timeout_s, **options)
