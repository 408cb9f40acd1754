"""What petastorm reads as a DataFrame whose partition i holds the row groups of replica i."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import types as T

from sparkdeep.checks import hint
from sparkdeep.data.petastorm.reading import ARROW_TYPES, Column, Contents, Dataset, RowGroup, inspect, read_share
from sparkdeep.errors import ConfigError, DataError
from sparkdeep.spark.session.failures import named_failures

__all__ = ["PetastormSource", "active_session", "open_source", "source_of"]

_LOG = logging.getLogger("sparkdeep")
_READERS: Final = ("make_reader", "make_batch_reader")
_CONVERTER: Final = "petastorm.spark.spark_dataset_converter.SparkDatasetConverter"
_OURS: Final = {
    "schema_fields": "give fields=",
    "cur_shard": "row groups are dealt by num_workers",
    "shard_count": "row groups are dealt by num_workers",
    "shard_seed": "row groups are dealt in their order",
    "num_epochs": "each row is read once; epochs= of the estimator repeats it",
    "reader_pool_type": "threads read, inside the task",
    "shuffle_row_groups": "the estimator shuffles, by its seed",
    "shuffle_rows": "the estimator shuffles, by its seed",
    "shuffle_row_drop_partitions": "the estimator shuffles, by its seed",
    "rowgroup_selector": "filter with predicate= or filters=",
    "seed": "the estimator shuffles, by its seed",
}
"""Arguments of petastorm's readers that are set here -> what to do instead."""

_SPARK_TYPES: Final[Mapping[pa.DataType, T.DataType]] = {
    pa.bool_(): T.BooleanType(),
    pa.int8(): T.ByteType(),
    pa.int16(): T.ShortType(),
    pa.int32(): T.IntegerType(),
    pa.int64(): T.LongType(),
    pa.float32(): T.FloatType(),
    pa.float64(): T.DoubleType(),
    pa.binary(): T.BinaryType(),
}


@dataclass(frozen=True)
class _Share:
    """What a task needs to read the share of one replica."""

    dataset: Dataset
    columns: tuple[Column, ...]
    num_workers: int
    digest: str


@dataclass(frozen=True)
class PetastormSource:
    """A dataset that replicas read through petastorm; made by `sparkdeep.petastorm.open`, taken by `TorchEstimator.fit`."""

    dataset: Dataset
    fields: tuple[str, ...] | None = None

    def row_groups(self, num_workers: int) -> list[tuple[RowGroup, ...]]:
        """Which row groups each replica reads; every one is read by exactly one replica.

        Raises:
            DataError: there are fewer row groups than replicas.
        """
        return _dealt(inspect(self.dataset), num_workers, self.dataset)

    def dataframe(self, spark: SparkSession, num_workers: int, columns: Sequence[str] | None = None) -> DataFrame:
        """The rows as a DataFrame of `num_workers` partitions; petastorm reads where and when Spark runs them.

        Args:
            spark: the session.
            num_workers: replicas.
            columns: fields to read; None for every field that can be trained on, of `fields` where that was given.

        Returns:
            A number, boolean or bytes in each row, or arrays of numbers nested as deep as the field has dimensions. Unsigned
            integers come as the next wider type, float16 as float, decimals as double.

        Raises:
            ConfigError: petastorm cannot be imported here.
            DataError: a column is unknown or no tensor can be made of it, there are fewer row groups than replicas, or
                petastorm cannot open the dataset.
        """
        contents = inspect(self.dataset)
        shares = _dealt(contents, num_workers, self.dataset)
        chosen = _chosen(contents, self.fields, columns)
        _LOG.info(
            "%s: %d row groups to %d replicas, %s each",
            self.dataset.name,
            len(contents.row_groups),
            num_workers,
            ", ".join(str(len(share)) for share in shares),
        )
        job = _Share(self.dataset, chosen, num_workers, contents.digest())
        fields = [T.StructField(column.name, _spark_type(column)) for column in chosen]
        return spark.range(0, num_workers, 1, num_workers).mapInArrow(partial(_read_task, job), T.StructType(fields))


def open_source(
    url: str | Sequence[str],
    *,
    reader: Literal["make_reader", "make_batch_reader"] = "make_reader",
    fields: Sequence[str] | None = None,
    timeout_s: float = 300.0,
    **options: Any,
) -> PetastormSource:
    """A dataset that replicas read through petastorm's own reader; see `sparkdeep.petastorm.open`."""
    if reader not in _READERS:
        raise ConfigError(f"reader={reader!r}: must be one of {list(_READERS)}.")
    for name, value in options.items():
        if name in _OURS:
            raise ConfigError(f"{name}={value!r} is set by sparkdeep: {_OURS[name]}.")
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not timeout_s > 0:
        raise ConfigError(f"timeout_s={timeout_s!r}: must be a number of seconds above zero.")
    if fields is not None and (isinstance(fields, str) or not fields):
        raise ConfigError(f"fields={fields!r}: give a list of names, or None for every field.")
    urls = _url(url) if isinstance(url, str) else tuple(_url(one) for one in url)
    if not urls:
        raise ConfigError(f"url={url!r}: give a folder, or a list of Parquet files.")
    dataset = Dataset(url=urls, reader=reader, options=options, timeout_s=timeout_s)
    return PetastormSource(dataset, None if fields is None else tuple(fields))


def source_of(given: Any) -> PetastormSource | None:
    """The source that fit was given, also as petastorm's SparkDatasetConverter; None for anything else."""
    if isinstance(given, PetastormSource):
        return given
    # Named, not imported: petastorm is not needed for DataFrames.
    if any(f"{one.__module__}.{one.__name__}".startswith(_CONVERTER) for one in type(given).__mro__):
        return open_source(sorted(given.file_urls), reader="make_batch_reader")
    return None


def active_session() -> SparkSession:
    """The session to read a source in, which brings none of its own.

    Raises:
        ConfigError: there is none.
    """
    spark = SparkSession.getActiveSession()
    if spark is None:
        raise ConfigError("there is no active Spark session: SparkSession.builder.getOrCreate() first.")
    return spark


def _url(given: str) -> str:
    """With a scheme, which petastorm requires, and without a trailing slash."""
    return given.rstrip("/") if ":/" in given else f"file://{given.rstrip('/')}"


def _dealt(contents: Contents, num_workers: int, dataset: Dataset) -> list[tuple[RowGroup, ...]]:
    groups = contents.row_groups
    if len(groups) < num_workers:
        raise DataError(
            f"{dataset.name} has {len(groups)} row group(s) for num_workers={num_workers}: a row group is read by one replica, "
            f"whole, and every replica needs one. Set num_workers={max(len(groups), 1)}, write the dataset with more row groups "
            "(a smaller row_group_size_mb or parquet.block.size, or repartition before writing), or train from "
            "sparkdeep.petastorm.read(spark, url), which deals rows."
        )
    return [groups[number::num_workers] for number in range(num_workers)]


def _chosen(contents: Contents, fields: Sequence[str] | None, columns: Sequence[str] | None) -> tuple[Column, ...]:
    if columns is not None and fields is not None and not set(columns) <= set(fields):
        raise DataError(
            f"the columns {sorted(set(columns) - set(fields))} are not among fields={list(fields)}: add them."
        )
    wanted = list(dict.fromkeys(columns if columns is not None else fields or contents.columns))
    for name in wanted:
        if name in contents.refused:
            raise DataError(
                f"field {name!r} is {contents.refused[name]}, which cannot become a tensor: leave it out of fields=, or read the "
                "dataset by sparkdeep.petastorm.read(spark, url) and make numbers of it in Spark."
            )
        if name not in contents.columns:
            known = [*contents.columns, *contents.refused]
            raise DataError(f"the dataset has no field {name!r}.{hint(name, contents.columns)} It has {known}.")
    if not wanted:
        raise DataError(f"no field of the petastorm dataset can become a tensor: {dict(contents.refused)}.")
    return tuple(contents.columns[name] for name in wanted)


def _spark_type(column: Column) -> T.DataType:
    kind = _SPARK_TYPES[ARROW_TYPES[column.dtype]]
    for _ in range(column.ndim):
        kind = T.ArrayType(kind)
    return kind


def _read_task(job: _Share, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    with named_failures():
        for batch in batches:
            for number in batch.column(0).to_pylist():
                yield from read_share(job.dataset, job.columns, number, job.num_workers, job.digest)
