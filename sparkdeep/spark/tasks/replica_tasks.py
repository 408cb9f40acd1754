"""Where a task's replica runs, and the replica that dials the driver: what travels is one plain job value."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyspark import TaskContext

from sparkdeep.data.shards import Shard
from sparkdeep.errors import DataError
from sparkdeep.protocol.messages import Hello
from sparkdeep.protocol.plans import ReplicaPlan, Ticket
from sparkdeep.replica.channel import Channel, LogStream
from sparkdeep.replica.replica import Replica
from sparkdeep.replica.stage import open_replica, serve
from sparkdeep.spark.ingest.portions import unpacked
from sparkdeep.spark.session.failures import missing_module
from sparkdeep.spark.session.placement import resolve_device
from sparkdeep.spark.session.task import barrier_context, host_of, ready_device, run_root, task_context
from sparkdeep.storage.state_files import StateFiles
from sparkdeep.versions import versions

__all__ = ["Placed", "ReplicaJob", "ReplicaTask", "placed", "placed_anywhere"]


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
    problem = _problem(path, None if shard_dir is not None else root, manifest["host"])
    return _placed(context, manifest, path, device, problem)


def placed_anywhere(run: str, shard_dir: str | None, device: str, batches: Iterator[pa.RecordBatch]) -> Placed:
    """As `placed`, of a task that is in no barrier stage: the shard is one that moves to where the task runs."""
    context = task_context()
    manifest, path = unpacked(run, shard_dir, batches)
    return _placed(context, manifest, path, device, _problem(path, None, host_of(context)))


def _placed(context: TaskContext, manifest: dict[str, Any], path: Path, device: str, problem: str) -> Placed:
    gpus = context.resources().get("gpu")
    return Placed(
        replica=manifest["replica"],
        host=host_of(context),
        device=resolve_device(device, gpus.addresses if gpus else (), os.environ.get("CUDA_VISIBLE_DEVICES")),
        num_threads=context.cpus(),
        shard=str(path),
        problem=problem,
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


def _built(task: ReplicaTask, channel: Channel, shard: Shard, device: torch.device) -> Replica:
    try:
        return open_replica(task.job.plan, channel, shard, number=task.replica, device=device)
    except ModuleNotFoundError as error:
        raise missing_module(error.name or str(error), str(error)) from error


def _problem(path: Path, root: Path | None, host: str) -> str:
    if root is not None and path.parent != root:
        return f"its shard lies with another executor ({host}); Spark placed the task elsewhere."
    if not (path / "shard.json").is_file():
        return f"its shard {path.name} is no longer on the disk of {host}."
    return ""
