"""What runs on executors: module-level functions of one plain job value and the task's Arrow batches."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cloudpickle
import numpy as np
import pyarrow as pa
import torch
from pyspark import BarrierTaskContext, TaskContext

from sparkdeep.channel import Channel, LogStream
from sparkdeep.data.columns import Faults, read_fields
from sparkdeep.data.schema import Schema
from sparkdeep.data.scratch import claim, sweep
from sparkdeep.data.shards import Shard, ShardInfo, ShardWriter, encode_rows
from sparkdeep.disks import room_for_shards, volume_of
from sparkdeep.errors import DataError, PreflightError
from sparkdeep.launch import ReplicaPlan, Ticket, open_replica
from sparkdeep.messages import Hello
from sparkdeep.replica import Replica
from sparkdeep.session import serve, versions
from sparkdeep.spark.failures import missing_module, named_failures
from sparkdeep.spark.placement import resolve_device
from sparkdeep.state_files import StateFiles

__all__ = [
    "FLAG",
    "HASH",
    "IngestJob",
    "Placed",
    "ReplicaJob",
    "ReplicaTask",
    "barrier_context",
    "host_of",
    "ingest_task",
    "local_dirs",
    "manifest_batch",
    "numbered",
    "placed",
    "ready_device",
    "replica_task",
    "run_root",
    "written",
]

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


@dataclass(frozen=True, kw_only=True)
class ReplicaJob:
    """What every replica task of one stage needs to know."""

    plan: ReplicaPlan
    ticket: Ticket
    shard_dir: str | None
    worker_process: str
    """"reuse", "spawn", or "auto": a child process when it computes on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where a replica runs."""

    replica: int
    host: str
    device: str
    num_threads: int
    shard: str
    problem: str
    """"" or why the shard cannot be used here."""
    state_dir: str


@dataclass(frozen=True, kw_only=True)
class ReplicaTask(Placed):
    """One replica's place and job: made in the Python worker, and passed on to a child process where there is one."""

    job: ReplicaJob


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


def replica_task(job: ReplicaJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Be one replica for as long as the stage is open; the batch holds the manifest row of its shard."""
    with named_failures():
        place = placed(job.ticket.run, job.shard_dir, job.plan.settings.device, batches)
        task = ReplicaTask(job=job, **vars(place))
        spawn = job.worker_process == "spawn" or (job.worker_process == "auto" and task.device.startswith("cuda"))
        if spawn:
            from sparkdeep.spark.child import run_in_child

            run_in_child(task)
        else:
            run_replica(task)
    yield pa.RecordBatch.from_pydict({"replica": pa.array([task.replica], pa.int32())})


def placed(run: str, shard_dir: str | None, device: str, batches: Iterator[pa.RecordBatch]) -> Placed:
    """Find out where this barrier task's replica is.

    Args:
        run: the run's id.
        shard_dir: see `ReplicaJob`.
        device: the setting.
        batches: the manifest row of its shard.
    """
    context = barrier_context("training")
    rows = [row for batch in batches for row in batch.column("manifest").to_pylist()]
    if len(rows) != 1:
        raise DataError(f"the training task was given {len(rows)} shards; each replica has exactly one.")
    manifest = json.loads(rows[0])
    root = run_root(run, shard_dir)
    path = Path(manifest["path"])
    gpus = context.resources().get("gpu")
    return Placed(
        replica=manifest["replica"],
        host=host_of(context),
        device=resolve_device(device, gpus.addresses if gpus else (), os.environ.get("CUDA_VISIBLE_DEVICES")),
        num_threads=context.cpus(),
        shard=str(path),
        problem=_problem(path, None if shard_dir is not None else root, manifest["host"]),
        state_dir=str(path.parent / f"state-{manifest['replica']:05d}"),
    )


def run_replica(task: ReplicaTask) -> None:
    """Dial the driver and serve it; returns when the driver says stop."""
    job = task.job
    who = f"replica {task.replica} on {task.host}"
    device = ready_device(task.device, task.num_threads, who)
    ticket = job.ticket
    channel = Channel.dial(ticket.address, ticket.token, connect_timeout_s=ticket.connect_timeout_s, who=who)
    with contextlib.ExitStack() as stack:
        stack.callback(channel.close)
        shard = None if task.problem else Shard.open(Path(task.shard))
        hello = Hello(
            run=ticket.run,
            stage=ticket.stage,
            replica=task.replica,
            host=task.host,
            pid=os.getpid(),
            device=task.device,
            versions=versions(),
            rows=shard.info.rows if shard else {},
            digest=shard.info.digest if shard else "",
            shard=task.problem,
        )
        stack.enter_context(contextlib.redirect_stdout(LogStream(channel)))
        if shard is None:
            channel.introduce(hello)  # the driver refuses it, and makes new shards where replicas run
            return
        stack.callback(shard.close)
        serve(
            channel,
            hello,
            lambda: _built(task, channel, shard, device),
            StateFiles(Path(task.state_dir), ticket.stage),
        )


def ready_device(name: str, num_threads: int, who: str) -> torch.device:
    """The device, with this worker's torch set to the task's threads.

    Raises:
        PreflightError: torch cannot use it here.
    """
    torch.set_num_threads(num_threads)
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PreflightError(
            f"{who} was given {name}, but its torch {torch.__version__} sees no CUDA device. Install a CUDA build of "
            "torch on the executors, check the driver, or set device='cpu'."
        )
    return device


def _built(task: ReplicaTask, channel: Channel, shard: Shard, device: torch.device) -> Replica:
    try:
        return open_replica(task.job.plan, channel, shard, number=task.replica, device=device)
    except ModuleNotFoundError as error:
        raise missing_module(error.name or str(error), str(error)) from error


def barrier_context(what: str) -> BarrierTaskContext:
    """This barrier task's context.

    Raises:
        PreflightError: the engine does not run it as one.
    """
    context = TaskContext.get()
    if not isinstance(context, BarrierTaskContext):
        raise PreflightError(
            f"the {what} task is not in a barrier stage: this engine ignores mapInArrow(barrier=True). Disable native "
            "execution (Photon, Gluten, Comet, RAPIDS) for this session."
        )
    return context


def host_of(context: BarrierTaskContext) -> str:
    """The host that this barrier task runs on, as Spark names it."""
    address = context.getTaskInfos()[context.partitionId()].address
    return str(address).rsplit(":", 1)[0] or socket.gethostname()


def local_dirs() -> list[str]:
    """The executor's local directories."""
    return [folder for folder in os.environ.get("SPARK_LOCAL_DIRS", "").split(",") if folder]


def run_root(run: str, shard_dir: str | None) -> Path:
    """This executor's folder for the run, after sweeping what dead ones left beside it."""
    folders = local_dirs()
    if shard_dir is not None:
        Path(shard_dir).mkdir(parents=True, exist_ok=True)
        folders = [shard_dir]
    sweep(folders, spare=run if shard_dir is not None else "")
    return claim(folders, run)


def _problem(path: Path, root: Path | None, host: str) -> str:
    if root is not None and path.parent != root:
        return f"its shard lies with another executor ({host}); Spark placed the task elsewhere."
    if not (path / "shard.json").is_file():
        return f"its shard {path.name} is no longer on the disk of {host}."
    return ""


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
