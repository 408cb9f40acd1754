"""What runs on executors for portions of the rows: ordinary tasks, which Spark may run anywhere, again, and twice at a time."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from pyspark import TaskContext

from sparkdeep.disks import room_for_shards
from sparkdeep.errors import DataError
from sparkdeep.portion_files import pieces_of, unpack
from sparkdeep.spark.failures import named_failures
from sparkdeep.spark.placement import resolve_device
from sparkdeep.spark.round_tasks import RoundJob, answered
from sparkdeep.spark.tasks import IngestJob, Placed, manifest_batch, run_root, written
from sparkdeep.state_files import own_files

__all__ = ["PORTION_COLUMNS", "portion_ingest_task", "portion_task"]

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


def portion_task(job: RoundJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Do the order for the portion that the batches hold; yields its reply in parts."""
    with named_failures():
        task = _placed(job, batches)
    yield from answered(job, task)


def _placed(job: RoundJob, batches: Iterator[pa.RecordBatch]) -> Placed:
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
    root = run_root(job.order.run, job.shard_dir)
    path = Path(manifest["path"])
    if job.shard_dir is None:
        # By what it holds: a portion that was made again has the same rows, or is refused.
        path = root / f"portion-{manifest['replica']:05d}-{manifest['info']['digest'][:16]}"
        with room_for_shards(path):
            unpack([pieces[part] for part in sorted(pieces)], path)
    context = _context()
    gpus = context.resources().get("gpu")
    device = job.order.settings.device
    return Placed(
        replica=manifest["replica"],
        host=_host(),
        device=resolve_device(device, gpus.addresses if gpus else (), os.environ.get("CUDA_VISIBLE_DEVICES")),
        num_threads=context.cpus(),
        shard=str(path),
        problem="" if (path / "shard.json").is_file() else f"its portion {path.name} is no longer in shard_dir.",
        state_dir=str(root / f"state-{manifest['replica']:05d}"),
    )


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
