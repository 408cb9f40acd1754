"""Orders as Spark jobs over the persisted shards, one per round, with no port and no connection of our own."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final, final

from pyspark.sql import DataFrame, SparkSession

from sparkdeep.errors import PreflightError, ReplicaLostError, VersionMismatchError
from sparkdeep.protocol.orders import Job, Parcel, Reply
from sparkdeep.spark.doctor.conf_values import memory_bytes
from sparkdeep.spark.session.access import access_to
from sparkdeep.spark.session.jobs import SparkJob, mapped
from sparkdeep.spark.session.parcels import (
    ARTIFACT_LIMIT_BYTES,
    CLOSURE_LIMIT_BYTES,
    artifact_bytes,
    carrier_for,
)
from sparkdeep.spark.session.task import Shards
from sparkdeep.spark.tasks.round_tasks import (
    PROBE_COLUMNS,
    REPLY_COLUMNS,
    RoundJob,
    probe_task,
    read_replies,
    round_task,
)
from sparkdeep.versions import versions

__all__ = ["Load", "RoundJobs", "RunnerSettings", "SparkRunner", "StatelessRunner", "probe_session"]

# Arrow's framing, the headers, and the plan itself.
_MARGIN: Final = 1.2
_UNCONNECTED: Final[Mapping[str, str]] = {
    "coordinator_host": "no replica dials the driver",
    "coordinator_port": "no port is opened",
    "tls": "no port is opened, and Spark's own encryption holds",
    "aggregation": "no connection stays open between rounds",
}
_TOGETHER: Final = "each round is a job of its own that all replicas end together"


@dataclass(frozen=True, kw_only=True)
class RunnerSettings:
    """How jobs are run."""

    run: str
    num_replicas: int
    shard_dir: str | None
    exchange: str | None
    """`exchange_dir`."""
    open_timeout_s: float
    stall_timeout_s: float
    profile: Any
    """The stage's resource profile, or None."""
    on_busy: Callable[[], None] = lambda: None
    """Called every second in which a job has running tasks."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a fit will send and receive."""

    start_bytes: int
    """Parameters, buffers and averaged optimizer state: sent with every round."""
    fixed_bytes: int
    """The program, and parameters that are not trained: sent once."""
    rounds: int
    """At most this many are left."""
    wide: bool
    """Whether the mean comes back in float64."""
    durable: bool
    """Whether replica states are sent back to executors after a loss."""


class RoundJobs(ABC):
    """Runs each order as one job.

    Args:
        spark: the session.
        shards: of the run.
        settings: how jobs are run.
    """

    keeps_states: bool
    """Whether tasks are replicas in a barrier stage; where not, ordinary tasks, which keep no state."""
    CANNOT: ClassVar[Mapping[str, str]]
    """{setting: why it cannot be had here}."""

    def __init__(self, spark: SparkSession, shards: Shards, *, settings: RunnerSettings) -> None:
        self.num_replicas = settings.num_replicas
        self.exchange = settings.exchange
        self._spark = spark
        self._shards = shards
        self._settings = settings
        self._carrier = carrier_for(spark, settings.run, settings.exchange, self._submit)
        self._jobs = 0

    def ship(self, slot: str, data: bytes) -> Parcel:
        """Get `data` on its way, by whatever can carry its size here."""
        return self._carrier.ship(slot, data)

    def run(self, job: Job, description: str, *, timeout_s: float, idle_timeout_s: float) -> Sequence[Reply]:
        """Run the job over the shards."""
        settings = self._settings
        each = RoundJob(
            job=job,
            shard_dir=settings.shard_dir,
            open_timeout_s=settings.open_timeout_s,
            stall_timeout_s=settings.stall_timeout_s,
            keeps_states=self.keeps_states,
        )
        # Spark never starts a second copy of a barrier task, and starts none of them before there are slots for all.
        frame = mapped(
            self._shards.frame,
            partial(round_task, each),
            REPLY_COLUMNS,
            barrier=self.keeps_states,
            profile=settings.profile,
        )
        action = access_to(self._spark).batches
        return read_replies(self._result(frame, description, timeout_s, idle_timeout_s, action))

    def renew(self) -> None:
        """Ingest anew with the next job: each task then writes its shard where it runs."""
        self._shards.renew()

    def close(self) -> None:
        """Release what was shipped."""
        self._carrier.close()

    def check(self, load: Load) -> None:
        """Refuse what will not fit, before anything trains.

        Raises:
            PreflightError: with the numbers, and what to set.
        """
        access = access_to(self._spark)
        # From executors to the driver's JVM: without exchange_dir every replica's update, else the mean alone.
        count = self.num_replicas if self.exchange is None else 2 if load.wide else 1
        needed = int(_MARGIN * count * load.start_bytes)
        size = "spark.driver.maxResultSize"
        limit, heap = memory_bytes(size, access.conf(size) or "1g"), access.heap()
        if limit and needed > limit:  # 0 is no limit
            raise PreflightError(self._over_limit(needed, limit))
        # Results lie in the heap as they came, and once more while they are handed on to Python.
        if heap is not None and 2 * needed > heap:
            raise PreflightError(self._over_heap(needed, heap))
        if access.connect and self.exchange is None:
            self._check_artifacts(load)

    @abstractmethod
    def _over_limit(self, needed: int, limit: int) -> str:
        """The message where a round's results exceed `spark.driver.maxResultSize`."""

    @abstractmethod
    def _over_heap(self, needed: int, heap: int) -> str:
        """The message where they do not fit, twice, into the driver's heap."""

    def _check_artifacts(self, load: Load) -> None:
        used = artifact_bytes(self._spark)
        # Each round ships its start once, and the last validation ships the end.
        sends = [(load.start_bytes, load.rounds + 1), (load.fixed_bytes, 1)]
        if load.durable:
            # Adam keeps two more values a parameter, and its state comes with the random generators'.
            sends.append((3 * load.start_bytes, self.num_replicas))
        needed = sum(size * count for size, count in sends if size > CLOSURE_LIMIT_BYTES)
        if used + needed <= ARTIFACT_LIMIT_BYTES:
            return
        raise PreflightError(
            f"transport='spark' on Spark Connect: {load.start_bytes / 1e6:.1f} MB of parameters a round, {load.rounds} rounds"
            f"{', durable replica states' if load.durable else ''}: {needed / 1e6:.0f} MB in all, of which the session holds at "
            f"most {ARTIFACT_LIMIT_BYTES / 1e6:.0f} MB ({used / 1e6:.0f} MB are taken; up to {CLOSURE_LIMIT_BYTES / 1e6:.1f} MB "
            "at a time go with the task). Set exchange_dir= to a folder of shared storage that executors can reach (this "
            "client need not), or run fewer rounds (sync_every)."
        )

    def _submit(self, frame: DataFrame, description: str, timeout_s: float) -> Sequence[Any]:
        return self._result(frame, description, timeout_s, timeout_s, None)

    def _result(
        self,
        frame: DataFrame,
        description: str,
        timeout_s: float,
        idle_timeout_s: float,
        action: Callable[[Any], Sequence[Any]] | None,
    ) -> Sequence[Any]:
        self._jobs += 1
        tag = f"sparkdeep-{self._settings.run}-job-{self._jobs}"
        job = SparkJob(self._spark, frame, tag=tag, description=description, action=action)
        return job.result(timeout_s, description, idle_timeout_s=idle_timeout_s, on_busy=self._settings.on_busy)


@final
class SparkRunner(RoundJobs):
    """transport="spark": barrier jobs, in which each replica finds its shard and its state where the job before left them."""

    keeps_states = True
    CANNOT: ClassVar[Mapping[str, str]] = {
        **_UNCONNECTED,
        "rounds_per_stage": "every round is a job of its own",
        "overlap": "a round ends before the next one begins",
        "down_codec": "replicas are built anew for each round, and know no parameters that could have changed",
        "asynchronous": _TOGETHER,  # before what its presets set beside it
        "quorum": _TOGETHER,
        "on_nonfinite": _TOGETHER,
        "time_budget_s": _TOGETHER,
        "weighting": _TOGETHER,
        "schedule": _TOGETHER,
        "work": _TOGETHER,
        "aggregator": _TOGETHER,
        "replay": _TOGETHER,
        "min_workers": "the number of replicas does not change there",
        "worker_process": "replicas train in Spark's Python workers",
    }

    def _over_limit(self, needed: int, limit: int) -> str:
        remedy = "" if self.exchange is not None else " or exchange_dir= to a folder of storage that executors share,"
        return (
            f"transport='spark': a round brings {needed / 1e6:.0f} MB to the driver, and spark.driver.maxResultSize allows "
            f"{limit / 1e6:.0f} MB. Set that (and spark.driver.memory) higher,{remedy} or use transport='socket'."
        )

    def _over_heap(self, needed: int, heap: int) -> str:
        return (
            f"transport='spark': a round brings {needed / 1e6:.0f} MB through the driver's JVM, twice that while they are "
            f"handed on, and its heap is {heap / 1e6:.0f} MB. Set spark.driver.memory to at least "
            f"{2 * needed // (1 << 20) + 512}m, or use transport='socket', which does not pass there."
        )


@final
class StatelessRunner(RoundJobs):
    """Jobs of ordinary tasks that keep nothing: Spark may run each of them anywhere, again, and twice at a time."""

    keeps_states = False
    CANNOT: ClassVar[Mapping[str, str]] = {
        **_UNCONNECTED,
        "transport": "no replica dials the driver",
        "rounds_per_stage": "every evaluation is a job of its own",
        "exchange_dir": "gradients go to the driver, which adds them up",
        "deal": "rows are dealt by their hash",
        "deal_key": "no replica keeps rows: any task may take any of them",
        "worker_process": "tasks run in Spark's Python workers",
    }

    def _over_limit(self, needed: int, limit: int) -> str:
        return self._no_room(needed, f"spark.driver.maxResultSize allows {limit / 1e6:.0f} MB")

    def _over_heap(self, needed: int, heap: int) -> str:
        return self._no_room(2 * needed, f"the driver's JVM has {heap / 1e6:.0f} MB")

    def _no_room(self, needed: int, room: str) -> str:
        return (
            f"portions={self.num_replicas}: their gradients are {needed / 1e6:.0f} MB in the driver's JVM, and {room}. Give fewer "
            "portions=, raise spark.driver.maxResultSize and spark.driver.memory, or set portions=None, with which replicas send "
            "their gradients over sockets."
        )

    def _check_artifacts(self, load: Load) -> None:
        if load.start_bytes > CLOSURE_LIMIT_BYTES:
            raise PreflightError(
                f"portions= on Spark Connect: {load.start_bytes / 1e6:.1f} MB of parameters go out with every evaluation, and up to "
                f"{CLOSURE_LIMIT_BYTES / 1e6:.1f} MB go with a task there. Use a classic session, or portions=None with sync_every=."
            )
        super()._check_artifacts(load)


def probe_session(
    spark: SparkSession, run: str, num_workers: int, profile: Any, *, exchange: str | None, timeout_s: float
) -> None:
    """Start `num_workers` barrier tasks at once; each must run our versions and see the shared storage.

    Raises:
        PreflightError: they did not start within `timeout_s`, or executors do not share `exchange`.
        VersionMismatchError: an executor runs other versions than the driver.
    """
    task = partial(probe_task, run, num_workers, exchange)
    frame = mapped(spark.range(0, num_workers, 1, num_workers), task, PROBE_COLUMNS, barrier=True, profile=profile)
    job = SparkJob(spark, frame, tag=f"sparkdeep-{run}-probe", description="sparkdeep fit: probe")
    try:
        rows = job.result(timeout_s, "probing the session")
    except ReplicaLostError as error:
        raise PreflightError(
            f"num_workers={num_workers}: the session did not run that many barrier tasks at once within {timeout_s:g} s "
            f"({error}). Lower num_workers, or give the session more executors or cores."
        ) from error
    own = versions()
    if odd := {row["host"]: json.loads(row["versions"]) for row in rows if json.loads(row["versions"]) != own}:
        table = "\n".join(f"  {host}: {found}" for host, found in sorted(odd.items()))
        raise VersionMismatchError(
            f"driver and executors must run the same versions.\n  driver: {own}\n{table}\nInstall the driver's versions on the "
            "executors, or set spark.pyspark.python to an environment that has them."
        )
