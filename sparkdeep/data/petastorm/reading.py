"""Rows through petastorm's own reader, as Arrow batches: what a dataset holds, and one replica's row groups of it."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa

from sparkdeep.data.petastorm.nested import column_of
from sparkdeep.data.prefetch import pumped
from sparkdeep.errors import ConfigError, DataError, SparkdeepError

__all__ = ["ARROW_TYPES", "Column", "Contents", "Dataset", "RowGroup", "inspect", "read_share"]

_BATCH_ROWS: Final = 4096
_BATCH_BYTES: Final = 16 << 20
_JOIN_TIMEOUT_S: Final = 5.0
_WORKERS: Final = 4

ARROW_TYPES: Final[Mapping[str, pa.DataType]] = {
    **{name: pa.type_for_alias(name) for name in ("bool", "int8", "int16", "int32", "int64", "float32", "float64")},
    "uint8": pa.int16(),  # Spark has no unsigned integers
    "uint16": pa.int32(),
    "uint32": pa.int64(),
    "float16": pa.float32(),
    "decimal": pa.float64(),
    "bytes": pa.binary(),
}
"""What a column's element becomes, by `Column.dtype`."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset, and how petastorm is to open it."""

    url: str | tuple[str, ...]
    """Its folder, or its Parquet files."""
    reader: str
    """make_reader or make_batch_reader."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of that reader."""
    timeout_s: float = 300.0
    """A reader that gives nothing for this long has failed."""

    @property
    def name(self) -> str:
        """For messages."""
        return self.url if isinstance(self.url, str) else f"{self.url[0]} and {len(self.url) - 1} more file(s)"


@dataclass(frozen=True, order=True)
class RowGroup:
    """One row group of one Parquet file."""

    path: str
    index: int


@dataclass(frozen=True, kw_only=True)
class Column:
    """A field that a replica can train on."""

    name: str
    dtype: str
    """A key of `ARROW_TYPES`."""
    ndim: int
    """0 for a scalar a row."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What petastorm finds in a dataset."""

    columns: Mapping[str, Column]
    refused: Mapping[str, str]
    """Fields that cannot become tensors, each with the reason."""
    row_groups: tuple[RowGroup, ...]
    """In petastorm's order: number i goes to replica i % num_workers."""

    def digest(self) -> str:
        """Equal for the same row groups in the same order."""
        return _digest(self.row_groups)


def inspect(dataset: Dataset) -> Contents:
    """Open the dataset as petastorm's readers do, without reading rows.

    petastorm unpickles the schema that is stored with the dataset, by its own restricted unpickler: open only datasets
    that you trust.

    Raises:
        ConfigError: petastorm cannot be imported.
        DataError: it cannot open the dataset, or took longer than `timeout_s`.
    """
    _modules()
    return next(pumped(lambda _: iter([_inspected(dataset)]), dataset.timeout_s, _silence(dataset)))


def read_share(
    dataset: Dataset, columns: Sequence[Column], share: int, num_shares: int, expected: str
) -> Iterator[pa.RecordBatch]:
    """One replica's row groups, each row once, through petastorm's reader.

    Args:
        dataset: what to open.
        columns: fields to read; no others are read from storage.
        share: the replica's number; it gets the row groups whose number modulo `num_shares` is this.
        num_shares: replicas.
        expected: the `Contents.digest` that the driver saw.

    Raises:
        DataError: the dataset is not the one that the driver saw, cannot be read, or gave nothing for `timeout_s`.
    """
    return pumped(
        lambda beat: _batches(dataset, columns, share, num_shares, expected, beat), dataset.timeout_s, _silence(dataset)
    )


def _silence(dataset: Dataset) -> str:
    return (
        f"petastorm's {dataset.reader} gave nothing of {dataset.name} for {dataset.timeout_s:g} s: its storage may hang. Look "
        "at the executor's log, or raise timeout_s= of sparkdeep.petastorm.open."
    )


def _modules() -> tuple[Any, Any]:
    """Petastorm, and its module about what lies beside the rows."""
    try:
        with _quiet():
            return importlib.import_module("petastorm"), importlib.import_module("petastorm.etl.dataset_metadata")
    except (ImportError, AttributeError) as error:
        found = isinstance(error, ModuleNotFoundError) and error.name == "petastorm"
        reason = (
            "petastorm is not installed"
            if found
            else f"petastorm cannot be imported with pyarrow {pa.__version__} ({error}): it needs pyarrow 14 or older, which "
            "still had pyarrow.filesystem"
        )
        raise ConfigError(
            f"{reason}. To read its datasets without petastorm, use sparkdeep.petastorm.read(spark, url); to read through "
            "petastorm, install sparkdeep[petastorm] in an environment of its own, on driver and executors."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # petastorm calls functions that pyarrow 14 and Python 3.11 have deprecated; and it recommends make_reader,
        # which is the caller's choice.
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield


@contextmanager
def _named(dataset: Dataset) -> Iterator[None]:
    try:
        yield
    except SparkdeepError:
        raise
    except Exception as error:  # petastorm, its storage or a transform may raise anything
        raise DataError(
            f"petastorm's {dataset.reader} failed on {dataset.name}: {type(error).__name__}: {error}. Check the URL (with its "
            "scheme: file:///data/x), that every executor reaches it, and that the reader fits: make_reader for datasets "
            "that petastorm wrote, make_batch_reader for other Parquet."
        ) from error


def _inspected(dataset: Dataset) -> Contents:
    _, metadata = _modules()
    with _named(dataset), _quiet():
        filesystems = importlib.import_module("petastorm.fs_utils")
        parquet = importlib.import_module("pyarrow.parquet")
        options = dataset.options
        filesystem, path = filesystems.get_filesystem_and_path_or_paths(
            _urls(dataset),
            **{name: options[name] for name in ("hdfs_driver", "storage_options", "filesystem") if name in options},
        )
        opened = parquet.ParquetDataset(
            path, filesystem=filesystem, validate_schema=False, metadata_nthreads=10, filters=options.get("filters")
        )
        schema = metadata.infer_or_load_unischema(opened)
        if options.get("transform_spec") is not None:
            schema = importlib.import_module("petastorm.transform").transform_schema(schema, options["transform_spec"])
        groups = _row_groups(metadata, opened)
    columns, refused = {}, {}
    for name, one in schema.fields.items():
        dtype = _dtype(one.numpy_dtype)
        if dtype in ARROW_TYPES and not (dtype in ("bytes", "decimal") and one.shape):
            columns[name] = Column(name=name, dtype=dtype, ndim=len(one.shape or ()))
        else:
            refused[name] = f"{dtype}{list(one.shape) if one.shape else ''}"
    return Contents(columns=columns, refused=refused, row_groups=groups)


def _dtype(given: Any) -> str:
    if getattr(given, "__name__", "") == "Decimal":
        return "decimal"
    dtype = np.dtype(given)
    return {"S": "bytes", "U": "string"}.get(dtype.kind, dtype.name)


def _urls(dataset: Dataset) -> str | list[str]:
    # petastorm distinguishes a folder from files by the type.
    return dataset.url if isinstance(dataset.url, str) else list(dataset.url)


def _row_groups(metadata: Any, opened: Any) -> tuple[RowGroup, ...]:
    return tuple(RowGroup(str(piece.path), int(piece.row_group)) for piece in metadata.load_row_groups(opened))


def _digest(groups: Sequence[RowGroup]) -> str:
    listed = json.dumps([[group.path, group.index] for group in groups])
    return hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()


def _batches(
    dataset: Dataset,
    columns: Sequence[Column],
    share: int,
    num_shares: int,
    expected: str,
    beat: Callable[[], None],
) -> Iterator[pa.RecordBatch]:
    petastorm, metadata = _modules()
    options = {"workers_count": _WORKERS, **dataset.options, "schema_fields": _read_from_storage(dataset, columns)}
    with _named(dataset), _quiet():
        reader = getattr(petastorm, dataset.reader)(
            _urls(dataset),
            cur_shard=share,
            shard_count=num_shares,
            num_epochs=1,
            shuffle_row_groups=False,
            **options,
        )
        try:
            beat()
            found = _row_groups(metadata, reader.dataset)
            if _digest(found) != expected:
                raise DataError(
                    f"{dataset.name} holds {len(found)} row group(s) here that are not those the driver saw: its files changed "
                    "while it was read, or this host has another folder under the same name. Use storage that all hosts share."
                )
            beat()
            for rows in (_groups if reader.batched_output else _chunks)(_complete(reader, beat)):
                yield pa.RecordBatch.from_arrays(
                    [column_of(rows[c.name], ARROW_TYPES[c.dtype], c.ndim, c.name) for c in columns],
                    [c.name for c in columns],
                )
        finally:
            reader.stop()
            # It waits for its threads without a limit; they are daemons, so one that hangs in storage may be left behind.
            joiner = threading.Thread(target=reader.join, daemon=True)
            joiner.start()
            joiner.join(_JOIN_TIMEOUT_S)


def _read_from_storage(dataset: Dataset, columns: Sequence[Column]) -> list[str] | None:
    """Patterns of the fields to read, or None for all."""
    if dataset.options.get("transform_spec") is not None:
        return None  # the transform may use any of them
    names = {column.name for column in columns}
    if (predicate := dataset.options.get("predicate")) is not None:
        names |= set(predicate.get_fields())
    # Anchored at both ends, so that a name does not also choose the longer names that begin with it.
    return [f"^{re.escape(name)}$" for name in sorted(names)]


def _complete(reader: Any, beat: Callable[[], None]) -> Iterator[Any]:
    """Everything that the reader gives.

    petastorm stops when it finds its workers idle and then finds that the last row group was handed out. A row group
    that is handed out between these two checks is missed. It comes when the reader is asked again, since by then
    everything has been handed out.
    """
    for _ in range(2):
        for item in reader:
            beat()
            yield item


def _groups(items: Iterator[Any]) -> Iterator[dict[str, Any]]:
    """Row groups of make_batch_reader, each value an array of (rows, ...), cut into batches."""
    for group in items:
        values = group._asdict()
        rows = len(next(iter(values.values())))
        num_bytes = sum(int(one.nbytes) for one in values.values())
        step = max(1, min(_BATCH_ROWS, rows * _BATCH_BYTES // max(num_bytes, 1)))
        for start in range(0, rows, step):
            yield {name: one[start : start + step] for name, one in values.items()}


def _chunks(items: Iterator[Any]) -> Iterator[dict[str, Any]]:
    """Rows of make_reader, gathered into lists by field."""
    rows: list[Any] = []
    num_bytes = 0
    for row in items:
        rows.append(row)
        num_bytes += sum(getattr(value, "nbytes", 8) for value in row)
        if len(rows) == _BATCH_ROWS or num_bytes >= _BATCH_BYTES:
            yield dict(zip(row._fields, map(list, zip(*rows, strict=True)), strict=True))
            rows, num_bytes = [], 0
    if rows:
        yield dict(zip(rows[0]._fields, map(list, zip(*rows, strict=True)), strict=True))
