"""Shards on shared storage, dealt to another number of replicas: their rows are copied, and the source is not read again."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from sparkdeep.data.columns import Faults
from sparkdeep.data.schema import Schema
from sparkdeep.data.shards import SPLITS, Shard, ShardInfo, ShardWriter
from sparkdeep.spark.ingest.tasks import manifest_batch
from sparkdeep.spark.session.failures import named_failures
from sparkdeep.spark.session.task import barrier_context, host_of, run_root
from sparkdeep.storage.disks import room_for_shards

__all__ = ["RedealJob", "pieces", "redeal_task"]

_BLOCK_ROWS: Final = 1 << 16


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


def pieces(rows: Sequence[int], number: int, count: int) -> Iterator[tuple[int, int, int]]:
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
        batch = manifest_batch(number, host_of(context), directory, info, Faults(), weight)
    yield batch


def _copied(job: RedealJob, number: int, directory: Path) -> tuple[ShardInfo, float]:
    weight = 0.0
    with ShardWriter(directory, job.schema) as writer:
        for split in SPLITS:
            rows = [own[split] for _, own in job.shards]
            for source, first, last in pieces(rows, number, job.count):
                with contextlib.closing(Shard.open(Path(job.shards[source][0]))) as shard:
                    for start in range(first, last, _BLOCK_ROWS):
                        fields = shard.take(split, np.arange(start, min(start + _BLOCK_ROWS, last)))
                        writer.append(split, fields)
                        if split == "train":
                            weights = fields.get("weight")
                            rows_taken = min(start + _BLOCK_ROWS, last) - start
                            weight += float(weights.sum()) if isinstance(weights, np.ndarray) else rows_taken
        return writer.close(), weight
