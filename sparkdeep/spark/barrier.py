"""The barrier launcher: one Spark job a stage, in a thread of its own, under a tag of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, final

from pyspark.sql import DataFrame, SparkSession

from sparkdeep.errors import ReplicaLostError
from sparkdeep.generation import ShardFacts
from sparkdeep.launch import ReplicaPlan, RunningStage, Ticket
from sparkdeep.spark.cleaning import clean_task
from sparkdeep.spark.failures import translate
from sparkdeep.spark.session import access_to
from sparkdeep.spark.tasks import ReplicaJob, replica_task

__all__ = ["BarrierLauncher", "Shards", "SparkJob", "clean_executors"]

_LOG = logging.getLogger("sparkdeep")
_CLEAN_ATTEMPTS = 3
_LOOK_EVERY_S = 1.0
_CLEAN_TIMEOUT_S = 30.0


class SparkJob:
    """A Spark action in a thread, cancellable by its tag; the caller's job group and properties are left as they are."""

    def __init__(
        self,
        spark: SparkSession,
        frame: DataFrame,
        *,
        tag: str,
        description: str,
        action: Callable[[DataFrame], Sequence[Any]] | None = None,
    ) -> None:
        self._access = access_to(spark)
        self._frame = frame
        self._action = action or _collected
        self._tag = tag
        self._failure: BaseException | None = None
        self._rows: Sequence[Any] | None = None
        self._thread = self._access.start(self._run, tag=tag, description=description)

    def _run(self) -> None:
        try:
            self._rows = self._action(self._frame)
        except BaseException as error:  # noqa: BLE001 (handed to the thread that asks for `failure` or `result`)
            self._failure = translate(error)

    def failure(self) -> BaseException | None:
        """Why the job failed, named if we can name it; None while it runs or when it ended well."""
        return self._failure

    def result(
        self,
        timeout_s: float,
        what: str,
        *,
        idle_timeout_s: float | None = None,
        on_busy: Callable[[], None] = lambda: None,
    ) -> Sequence[Any]:
        """Wait for the rows.

        Args:
            timeout_s: for the whole job.
            what: it is, for the message.
            idle_timeout_s: for which it may have no running task: other jobs hold the slots that it waits for.
            on_busy: called every second in which it has one, where `idle_timeout_s` is given.

        Raises:
            ReplicaLostError: the job did not end, or had no slots, in time; it is cancelled.
            Exception: why it failed.
        """
        began = busy = looked = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(timeout=0.1)
            now = time.monotonic()
            if now - began > timeout_s:
                self.cancel()
                raise ReplicaLostError(f"{what} did not end within {timeout_s:g} s and was cancelled.")
            if idle_timeout_s is None or now - looked < _LOOK_EVERY_S:
                continue
            looked = now
            if self._access.has_tasks(self._tag) is not False:
                busy = now
                on_busy()
            elif now - busy > idle_timeout_s:
                self.cancel()
                raise ReplicaLostError(
                    f"{what} had no running task for {idle_timeout_s:g} s and was cancelled: a barrier stage needs all its "
                    "slots at the same time, and other jobs hold them. Let those end, give this session more executors, "
                    "lower num_workers, or raise open_timeout_s."
                )
        if self._failure is not None:
            raise self._failure
        if self._rows is None:
            raise ReplicaLostError(f"{what} was not submitted: its thread ended before; see its traceback above.")
        return self._rows

    def finish(self, timeout_s: float) -> None:
        """Wait for the end; what the tasks had to say they have said."""
        self._thread.join(timeout=timeout_s)
        if self._thread.is_alive():
            self.cancel()
            raise ReplicaLostError(
                f"the stage did not end within {timeout_s:g} s after its replicas were told to stop."
            )

    def cancel(self) -> None:
        """Cancel the job by its tag, and give it a moment to go."""
        if self._thread.is_alive():
            self._access.cancel(self._tag)
            self._thread.join(timeout=5.0)


def _collected(frame: DataFrame) -> Sequence[Any]:
    return frame.collect()


class Shards(Protocol):
    """Persisted shards, one a replica; see `shard_source.ShardSource`."""

    num_workers: int
    frame: DataFrame
    """One manifest row a shard."""

    def renew(self) -> None:
        """Make them anew with the next job: each task then writes its shard where it runs."""

    def resize(self, num_workers: int) -> Sequence[ShardFacts]:
        """Make them anew, so many; what they hold."""

    def close(self) -> None:
        """Let go of them."""


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
        """Shards, and tasks."""
        return self._shards.num_workers

    def launch(self, ticket: Ticket, description: str) -> RunningStage:
        """Submit the stage."""
        job = ReplicaJob(plan=self._plan, ticket=ticket, shard_dir=self._shard_dir, worker_process=self._worker_process)
        extra = {"profile": self._profile} if self._profile is not None else {}
        frame = self._shards.frame.mapInArrow(partial(replica_task, job), "replica int", barrier=True, **extra)
        return SparkJob(self._spark, frame, tag=f"sparkdeep-{ticket.run}-{ticket.stage}", description=description)

    def renew(self) -> None:
        """Ingest anew with the next stage: each task then writes its shard where it runs."""
        self._shards.renew()

    def slots(self) -> int | None:
        """Tasks of the stage's profile that can run at the same time, busy or not."""
        return access_to(self._spark).slots(self._profile)

    def resize(self, num_replicas: int) -> Sequence[ShardFacts]:
        """Ingest anew, into so many shards."""
        return self._shards.resize(num_replicas)

    def close(self) -> None:
        """Let go of the persisted shards."""
        self._shards.close()


def clean_executors(
    spark: SparkSession,
    run: str,
    shard_dir: str | None,
    *,
    exchange: str | None = None,
    num_workers: int = 1,
) -> bool:
    """Remove a run's folders on every executor that is up; returns whether all of them were reached.

    A folder of an executor that is gone lies in its Spark local directory, and is swept by the next fit on that host.

    Args:
        spark: the session.
        run: the run's id.
        shard_dir: the shared folder of shards, or None.
        exchange: that of updates, or None.
        num_workers: replicas; twice as many tasks run where the session cannot tell its slots (Spark Connect).
    """
    access = access_to(spark)
    reached: set[str] = set()
    for attempt in range(_CLEAN_ATTEMPTS):
        try:  # all of it, as nothing can be asked of a session that was stopped
            # Each task stays in its slot for a moment, so that every executor gets one.
            slots = max(1, access.slots(None) or 2 * num_workers)
            task = partial(clean_task, run, shard_dir, exchange)
            frame = spark.range(0, slots, 1, slots).mapInArrow(task, "executor string")
            job = SparkJob(spark, frame, tag=f"sparkdeep-{run}-clean-{attempt}", description="sparkdeep fit: clean up")
            reached |= {row["executor"] for row in job.result(_CLEAN_TIMEOUT_S, "cleaning up")}
            executors = access.executors()
        except Exception as error:  # noqa: BLE001 (a failed clean-up must not hide the fit's own outcome; it is logged)
            _LOG.warning("cleaning up failed: %s", error)
            return False
        if executors is None or len(reached) >= executors:
            return True
    return False
