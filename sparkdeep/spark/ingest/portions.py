"""Portions of the rows: shards whose files Spark itself keeps and moves, so that any of them can be given to a task anywhere."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from pyspark.sql import DataFrame

from sparkdeep.data.portions import pieces_of, unpack
from sparkdeep.errors import DataError
from sparkdeep.spark.ingest.tasks import IngestJob, manifest_batch, written
from sparkdeep.spark.session.failures import named_failures
from sparkdeep.spark.session.task import host_of, run_root, task_context
from sparkdeep.storage.disks import room_for_shards
from sparkdeep.storage.state_files import own_files

__all__ = ["PORTION_COLUMNS", "manifests_of", "portion_ingest_task", "unpacked"]


PORTION_COLUMNS: Final = "replica int, manifest string, sample binary, part int, data binary"
"""A portion's manifest row, as of a shard, and the pieces of its files after it unless they lie in `shard_dir`."""


def portion_ingest_task(job: IngestJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Make this partition's rows one portion; yields its manifest row, and its files where they are to move with it."""
    with named_failures():
        context = task_context()
        number = context.partitionId()
        root = run_root(job.run, job.shard_dir)
        directory = root / f"portion-{number:05d}-{secrets.token_hex(4)}"
        with room_for_shards(directory):
            info, faults, weight = written(job, directory, batches)
        manifest = manifest_batch(number, host_of(context), directory, info, faults, weight)
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
