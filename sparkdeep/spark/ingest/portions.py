"""What runs on executors to make portions: a partition's rows become one portion, on disk or as bytes in rows."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from typing import Final

import pyarrow as pa
from pyspark import TaskContext

from sparkdeep.data.portions import pieces_of
from sparkdeep.spark.ingest.tasks import IngestJob, manifest_batch, written
from sparkdeep.spark.session.failures import named_failures
from sparkdeep.spark.session.task import run_root
from sparkdeep.storage.disks import room_for_shards
from sparkdeep.storage.state_files import own_files

__all__ = ["PORTION_COLUMNS", "portion_ingest_task"]


PORTION_COLUMNS: Final = "replica int, manifest string, sample binary, part int, data binary"
"""A portion's manifest row, as of a shard, and the pieces of its files after it unless they lie in `shard_dir`."""


def portion_ingest_task(job: IngestJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Make this partition's rows one portion; yields its manifest row, and its files where they are to move with it."""
    with named_failures():
        number = _context().partitionId()
        root = run_root(job.run, job.shard_dir)
        directory = root / f"portion-{number:05d}-{secrets.token_hex(4)}"
        with room_for_shards(directory):
            info, faults, weight = written(job, directory, batches)
        manifest = manifest_batch(number, _host(), directory, info, faults, weight)
    yield _row(number, 0, manifest=manifest)
    if job.shard_dir is None:
        with named_failures(), own_files("it read the portion"):
            for part, piece in enumerate(pieces_of(directory), 1):
                yield _row(number, part, data=piece)
            shutil.rmtree(directory, ignore_errors=True)


def _context() -> TaskContext:
    context = TaskContext.get()
    assert context is not None, "this runs in a Spark task"
    return context


def _host() -> str:
    return os.environ.get("SPARK_LOCAL_IP") or socket.gethostname()


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
