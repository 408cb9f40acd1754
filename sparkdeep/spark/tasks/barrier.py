"""The barrier launcher: one Spark job per stage, in a thread of its own, under a tag of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, final

import pyarrow as pa
from pyspark.sql import SparkSession

from sparkdeep.protocol.messages import ReplicaPlan, ShardFacts, Ticket
from sparkdeep.spark.session.access import access_to
from sparkdeep.spark.session.failures import named_failures
from sparkdeep.spark.session.jobs import SparkJob, mapped
from sparkdeep.spark.session.task import Shards
from sparkdeep.spark.tasks.replica_tasks import ReplicaJob, ReplicaTask, placed, run_replica
from sparkdeep.stages.staffing import RunningStage

__all__ = ["BarrierLauncher", "replica_task"]


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
        task = partial(replica_task, job)
        frame = mapped(self._shards.frame, task, "replica int", barrier=True, profile=self._profile)
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
        spawn = job.worker_process == "spawn" or (job.worker_process == "auto" and task.device.startswith("cuda"))
        if spawn:
            from sparkdeep.spark.tasks.child import run_in_child

            run_in_child(task)
        else:
            run_replica(task)
    yield pa.RecordBatch.from_pydict({"replica": pa.array([task.replica], pa.int32())})
