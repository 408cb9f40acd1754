"""Replicas in a barrier stage: its launcher, a Spark job a stage; its tasks, which find their place and dial the driver."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql import SparkSession

from sparkdeep.errors import DataError
from sparkdeep.models.packing import unpack_program
from sparkdeep.models.program import Program
from sparkdeep.protocol.messages import ReplicaPlan, ShardFacts, Ticket
from sparkdeep.replica.link import LogStream, ReplicaLink
from sparkdeep.replica.stage import Place, live
from sparkdeep.spark.ingest.tasks import unpacked
from sparkdeep.spark.session.access import access_to
from sparkdeep.spark.session.failures import missing_module, named_failures
from sparkdeep.spark.session.jobs import SparkJob, mapped
from sparkdeep.spark.session.placement import resolve_device
from sparkdeep.spark.session.task import Shards, barrier_context, host_of, ready_device, run_root, task_context
from sparkdeep.stages.staffing import RunningStage

__all__ = ["BarrierLauncher", "ReplicaTask", "open_program", "placed", "placed_anywhere", "run_replica"]


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


@final
class BarrierLauncher:
    """Starts one replica per persisted shard, in a barrier stage.

    Args:
        spark: the session.
        shards: of the run.
        plan: of the run.
        shard_dir, worker_process: see `ReplicaJob`.
        profile: the stage's resource profile, or None.
    """

    CANNOT: ClassVar[Mapping[str, str]] = {"exchange_dir": "updates go to the driver"}
    """{setting: why it cannot be had here}."""

    def __init__(
        self,
        spark: SparkSession,
        shards: Shards,
        *,
        plan: ReplicaPlan,
        shard_dir: str | None,
        worker_process: str,
        profile: Any,
    ) -> None:
        self._spark = spark
        self._shards = shards
        self._plan = plan
        self._shard_dir = shard_dir
        self._worker_process = worker_process
        self._profile = profile

    @property
    def num_replicas(self) -> int:
        """As many as there are shards."""
        return self._shards.num_workers

    def launch(self, ticket: Ticket, description: str) -> RunningStage:
        """Submit the stage."""
        job = ReplicaJob(plan=self._plan, ticket=ticket, shard_dir=self._shard_dir, worker_process=self._worker_process)
        frame = mapped(
            self._shards.frame, partial(replica_task, job), "replica int", barrier=True, profile=self._profile
        )
        return SparkJob(self._spark, frame, tag=f"sparkdeep-{ticket.run}-{ticket.stage}", description=description)

    def renew(self) -> None:
        """Ingest anew with the next stage: each task then writes its shard where it runs."""
        self._shards.renew()

    def slots(self) -> int | None:
        """Tasks of the stage's profile that can run at the same time, busy or not."""
        return access_to(self._spark).slots(self._profile)

    def resize(self, num_replicas: int) -> Sequence[ShardFacts]:
        """Deal the rows anew, to that many shards; returns what they hold."""
        return self._shards.resize(num_replicas)


def replica_task(job: ReplicaJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Be one replica for as long as the stage is open; the batch holds the manifest row of its shard."""
    with named_failures():
        place = placed(job.ticket.run, job.shard_dir, job.plan.settings.device, batches)
        task = ReplicaTask(job=job, **vars(place))
        if job.worker_process == "spawn" or (job.worker_process == "auto" and task.device.startswith("cuda")):
            from sparkdeep.spark.tasks.child import run_in_child

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
