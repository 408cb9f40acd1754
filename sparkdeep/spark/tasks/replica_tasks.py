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
from pyspark import TaskContext

from sparkdeep.errors import DataError
from sparkdeep.models.program import Program, unpack_program
from sparkdeep.protocol.messages import ReplicaPlan, Ticket
from sparkdeep.replica.link import LogStream, ReplicaLink
from sparkdeep.replica.stage import Place, live
from sparkdeep.spark.ingest.portions import unpacked
from sparkdeep.spark.session.failures import missing_module
from sparkdeep.spark.session.placement import resolve_device
from sparkdeep.spark.session.task import barrier_context, host_of, ready_device, run_root, task_context

__all__ = ["Placed", "ReplicaJob", "ReplicaTask", "open_program", "placed", "placed_anywhere"]


@dataclass(frozen=True, kw_only=True)
class ReplicaJob:
    """What every replica task of one stage needs to know."""

    plan: ReplicaPlan
    ticket: Ticket
    shard_dir: str | None
    worker_process: str
    """"reuse", "spawn", or "auto": a child process when it computes on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Placed(Place):
    """Where a replica runs."""

    num_threads: int


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
        shard=path,
        problem=problem,
        state_dir=path.parent / f"state-{manifest['replica']:05d}",
    )


def run_replica(task: ReplicaTask) -> None:
    """Dial the driver and serve it; returns when the driver says stop."""
    job = task.job
    who = f"replica {task.replica} on {task.host}"
    ready_device(task.device, task.num_threads, who)
    ticket = job.ticket
    link = ReplicaLink.dial(ticket.address, ticket.token, connect_timeout_s=ticket.connect_timeout_s, who=who)
    with contextlib.closing(link), contextlib.redirect_stdout(LogStream(link)):
        live(link, task, run=ticket.run, stage=ticket.stage, plan=lambda: job.plan, open_program=open_program)


def open_program(data: bytes) -> Program:
    """The user's objects.

    Raises:
        UserCodeError, VersionMismatchError: a module that they need is not installed here.
    """
    try:
        return unpack_program(data)
    except ModuleNotFoundError as error:
        raise missing_module(error.name or str(error), str(error)) from error


def _problem(path: Path, root: Path | None, host: str) -> str:
    if root is not None and path.parent != root:
        return f"its shard lies with another executor ({host}); Spark placed the task elsewhere."
    if not (path / "shard.json").is_file():
        return f"its shard {path.name} is no longer on the disk of {host}."
    return ""
