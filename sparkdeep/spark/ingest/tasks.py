"""What runs on executors to make shards: a partition's rows are checked, and written as one shard."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cloudpickle
import numpy as np
import pyarrow as pa

from sparkdeep.data.columns import Faults, read_fields
from sparkdeep.data.schema import Schema
from sparkdeep.data.shards import Shard, ShardInfo, ShardWriter, encode_rows
from sparkdeep.errors import DataError
from sparkdeep.spark.session.failures import named_failures
from sparkdeep.spark.session.task import barrier_context, host_of, run_root
from sparkdeep.storage.disks import room_for_shards, volume_of
from sparkdeep.versions import versions

__all__ = ["FLAG", "HASH", "SAMPLE_ROWS", "IngestJob", "ingest_task", "manifest_batch", "numbered", "written"]


FLAG: Final = "__sparkdeep_validation"


HASH: Final = "__sparkdeep_hash"


SAMPLE_ROWS: Final = 7  # odd, and a width that few layers have: rows are not taken for features


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
        context = barrier_context("ingest")
        root = run_root(job.run, job.shard_dir)
        number = context.partitionId()
        directory = root / f"shard-{number:05d}-{secrets.token_hex(4)}"
        with room_for_shards(directory):
            info, faults, weight = written(job, directory, batches)
        batch = manifest_batch(number, host_of(context), directory, info, faults, weight)
    yield batch


def manifest_batch(
    number: int, host: str, directory: Path, info: ShardInfo, faults: Faults, weight: float
) -> pa.RecordBatch:
    """The manifest row of a shard that was just written."""
    with contextlib.closing(Shard.open(directory)) as shard:
        sample = encode_rows(shard.head(SAMPLE_ROWS))
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
    """Write the shard; what it holds, what was wrong with the rows, and the sum of the training rows' weights."""
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
                    weights = fields.get("weight")
                    weight += float(weights.sum()) if isinstance(weights, np.ndarray) else part.num_rows
                if not faults.found:  # what follows a fault is counted, not kept
                    writer.append(split, fields)
        return writer.close(), faults, weight


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
