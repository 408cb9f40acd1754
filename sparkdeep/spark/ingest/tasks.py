"""What runs on executors to write shards: from rows, as portions that move, or from other shards; their manifest rows."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cloudpickle
import numpy as np
import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql import DataFrame

from sparkdeep.data.arrow import FieldValues
from sparkdeep.data.columns import Faults, read_fields
from sparkdeep.data.portions import pieces_of, unpack
from sparkdeep.data.schema import Schema
from sparkdeep.data.shards import SPLITS, Shard, ShardInfo, ShardWriter, encode_rows
from sparkdeep.errors import DataError
from sparkdeep.spark.session.failures import named_failures
from sparkdeep.spark.session.task import barrier_context, host_of, run_root, task_context
from sparkdeep.storage.disks import own_files, room_for_shards, volume_of
from sparkdeep.versions import versions

__all__ = [
    "FLAG",
    "HASH",
    "MANIFEST_COLUMNS",
    "PORTION_COLUMNS",
    "IngestJob",
    "RedealJob",
    "ingest_task",
    "manifests_of",
    "numbered",
    "portion_ingest_task",
    "redeal_task",
    "unpacked",
    "written",
]

FLAG: Final = "__sparkdeep_validation"
HASH: Final = "__sparkdeep_hash"
MANIFEST_COLUMNS: Final = "replica int, manifest string, sample binary"
"""What a task that writes a shard yields."""

PORTION_COLUMNS: Final = "replica int, manifest string, sample binary, part int, data binary"
"""A portion's manifest row, as of a shard, and the pieces of its files after it unless they lie in `shard_dir`."""

_SAMPLE_ROWS: Final = 7  # odd, and a width that few layers have, so that rows are not mistaken for features
_BLOCK_ROWS: Final = 1 << 16


@dataclass(frozen=True, kw_only=True)
class IngestJob:
    """What every ingest task needs to know."""

    run: str
    schema: Schema
    decode: bytes
    """cloudpickled: None, a callable, or {column: callable}."""
    shard_dir: str | None
    """Shared storage for shards, or None for the executor's own local directory."""


def numbered(index: int) -> str:
    """Name under which the schema's `index`-th column travels through Spark."""
    return f"__sparkdeep_column_{index}"


def ingest_task(job: IngestJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Write this partition's rows as one shard; yields one manifest row."""
    with named_failures():
        _, batch = _ingested(job, barrier_context("ingest"), "shard", batches)
    yield batch


def _ingested(
    job: IngestJob, context: TaskContext, kind: str, batches: Iterator[pa.RecordBatch]
) -> tuple[Path, pa.RecordBatch]:
    """Write this partition's rows to a new folder; returns it and the manifest row."""
    number = context.partitionId()
    directory = run_root(job.run, job.shard_dir) / f"{kind}-{number:05d}-{secrets.token_hex(4)}"
    with room_for_shards(directory):
        info, faults, weight = written(job, directory, batches)
    return directory, _manifest_batch(number, host_of(context), directory, info, faults, weight)


def _manifest_batch(
    number: int, host: str, directory: Path, info: ShardInfo, faults: Faults, weight: float
) -> pa.RecordBatch:
    """The manifest row of a shard that was just written."""
    with contextlib.closing(Shard.open(directory)) as shard:
        sample = encode_rows(shard.head(_SAMPLE_ROWS))
    manifest = {
        "replica": number,
        "host": host,
        "path": str(directory),
        "root": str(directory.parent),
        "info": info.to_json(),
        "faults": faults.to_json(),
        "weight": weight,
        "volume": volume_of(directory.parent).to_json(),
        "versions": versions(),
    }
    return pa.RecordBatch.from_pydict(
        {
            "replica": pa.array([number], pa.int32()),
            "manifest": pa.array([json.dumps(manifest)], pa.string()),
            "sample": pa.array([sample], pa.binary()),
        }
    )


def written(job: IngestJob, directory: Path, batches: Iterator[pa.RecordBatch]) -> tuple[ShardInfo, Faults, float]:
    """Write the shard; returns what it holds, what was wrong with the rows, and the sum of the training rows' weights."""
    faults, weight = Faults(), 0.0
    decode = cloudpickle.loads(job.decode)
    names = {numbered(i): name for i, name in enumerate(job.schema.columns())}
    with ShardWriter(directory, job.schema) as writer:
        for batch in batches:
            # (RecordBatch.rename_columns came with pyarrow 15)
            named = pa.RecordBatch.from_arrays(batch.columns, [names.get(name, name) for name in batch.schema.names])
            for split, part in _splits(named):
                fields = read_fields(part, job.schema, faults, decode)
                if split == "train":
                    weight += _weight(fields, part.num_rows)
                if not faults.found:  # what follows a fault is counted, not kept
                    writer.append(split, fields)
        return writer.close(), faults, weight


def _weight(fields: Mapping[str, FieldValues], rows: int) -> float:
    weights = fields.get("weight")
    return float(weights.sum()) if isinstance(weights, np.ndarray) else rows


def _splits(batch: pa.RecordBatch) -> list[tuple[str, Any]]:
    flags = batch.column(FLAG)
    if flags.null_count:
        raise DataError(
            f"the validation column has {flags.null_count} null(s): every row must say true or false; "
            "use coalesce(col, lit(False))."
        )
    chosen = flags.true_count
    if chosen == 0:
        return [("train", batch)]
    if chosen == batch.num_rows:
        return [("validation", batch)]
    import pyarrow.compute as pc

    return [("train", batch.filter(pc.invert(flags))), ("validation", batch.filter(flags))]


# -- portions: shards whose files Spark itself keeps and moves, so that any of them can be given to a task anywhere ----


def portion_ingest_task(job: IngestJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Make this partition's rows one portion; yields its manifest row, and its files where they are to move with it."""
    with named_failures():
        context = task_context()
        number = context.partitionId()
        directory, manifest = _ingested(job, context, "portion", batches)
    yield _row(number, 0, manifest=manifest)
    if job.shard_dir is None:
        with named_failures(), own_files("it read the portion"):
            for part, piece in enumerate(pieces_of(directory), 1):
                yield _row(number, part, data=piece)
            shutil.rmtree(directory, ignore_errors=True)


def manifests_of(portions: DataFrame) -> DataFrame:
    """The manifest rows alone; collecting them persists the rest."""
    return portions.where("part = 0").select("replica", "manifest", "sample")


def unpacked(run: str, shard_dir: str | None, batches: Iterator[pa.RecordBatch]) -> tuple[dict[str, Any], Path]:
    """The manifest of the portion that the batches hold, and the folder of its files: made here, or in `shard_dir`."""
    manifests: list[dict[str, Any]] = []
    pieces: dict[int, memoryview] = {}
    for batch in batches:
        for row, part in enumerate(batch.column("part").to_pylist()):
            if part == 0:
                manifests.append(json.loads(batch.column("manifest")[row].as_py()))
            else:
                pieces[part] = memoryview(batch.column("data")[row].as_buffer())
    if len(manifests) != 1:
        raise DataError(f"the task was given {len(manifests)} portions; each has exactly one.")
    manifest = manifests[0]
    root = run_root(run, shard_dir)
    if shard_dir is not None:
        return manifest, Path(manifest["path"])
    # Named by what it holds: a portion that was made again has the same rows, or is refused.
    path = root / f"portion-{manifest['replica']:05d}-{manifest['info']['digest'][:16]}"
    with room_for_shards(path):
        unpack([pieces[part] for part in sorted(pieces)], path)
    return manifest, path


def _row(
    number: int, part: int, *, manifest: pa.RecordBatch | None = None, data: bytes | None = None
) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(
        {
            "replica": pa.array([number], pa.int32()),
            "manifest": pa.array([None], pa.string()) if manifest is None else manifest.column("manifest"),
            "sample": pa.array([None], pa.binary()) if manifest is None else manifest.column("sample"),
            "part": pa.array([part], pa.int32()),
            "data": pa.array([data], pa.binary()),
        }
    )


# -- redealing: shards on shared storage, dealt to another number of replicas without reading the source again ---------


@dataclass(frozen=True, kw_only=True)
class RedealJob:
    """What every redealing task needs to know."""

    run: str
    schema: Schema
    """With dtypes and row shapes as they were seen."""
    shard_dir: str
    shards: tuple[tuple[str, dict[str, int]], ...]
    """Folder and rows by split of every existing shard, in order."""
    count: int
    """How many shards to make of them."""


def stretches(rows: Sequence[int], number: int, count: int) -> Iterator[tuple[int, int, int]]:
    """The `number`-th of `count` equal stretches of the rows of all shards, laid end to end.

    Args:
        rows: of each shard.
        number: from 0.
        count: of stretches.

    Yields:
        (shard, start, stop) of each part of it.
    """
    total = sum(rows)
    start, stop = number * total // count, (number + 1) * total // count
    at = 0
    for shard, own in enumerate(rows):
        first, last = max(start - at, 0), min(stop - at, own)
        if first < last:
            yield shard, first, last
        at += own


def redeal_task(job: RedealJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Write one new shard; yields its manifest row."""
    with named_failures():
        context = barrier_context("dealing")
        for _ in batches:
            pass  # a Python worker whose input is not read to its end is not used again
        number = context.partitionId()
        directory = run_root(job.run, job.shard_dir) / f"shard-{number:05d}-{secrets.token_hex(4)}"
        with room_for_shards(directory):
            info, weight = _copied(job, number, directory)
        batch = _manifest_batch(number, host_of(context), directory, info, Faults(), weight)
    yield batch


def _copied(job: RedealJob, number: int, directory: Path) -> tuple[ShardInfo, float]:
    weight = 0.0
    with ShardWriter(directory, job.schema) as writer:
        for split in SPLITS:
            for source, first, last in stretches([own[split] for _, own in job.shards], number, job.count):
                with contextlib.closing(Shard.open(Path(job.shards[source][0]))) as shard:
                    for start in range(first, last, _BLOCK_ROWS):
                        rows = np.arange(start, min(start + _BLOCK_ROWS, last))
                        fields = shard.take(split, rows)
                        writer.append(split, fields)
                        if split == "train":
                            weight += _weight(fields, len(rows))
        return writer.close(), weight
