"""What runs on executors for portions of the rows: ordinary tasks, which Spark may run anywhere, again, and twice at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparkdeep.data.portions import unpack
from sparkdeep.errors import DataError
from sparkdeep.spark.ingest.portions import _context, _host
from sparkdeep.spark.session.failures import named_failures
from sparkdeep.spark.session.placement import resolve_device
from sparkdeep.spark.session.task import run_root
from sparkdeep.spark.tasks.replica_tasks import Placed
from sparkdeep.spark.tasks.round_tasks import RoundJob, answered
from sparkdeep.storage.disks import room_for_shards

__all__ = ["portion_task"]


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
