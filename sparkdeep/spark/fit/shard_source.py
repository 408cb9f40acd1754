"""A fit's rows as persisted shards: ingested, made anew where they were lost, dealt to another number of replicas."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, final

from pyspark.sql import DataFrame, SparkSession

from sparkdeep.data.schema import Schema
from sparkdeep.errors import ReplicaLostError
from sparkdeep.protocol.messages import ShardFacts
from sparkdeep.rounds.guards import FailureLedger
from sparkdeep.spark.fit.programs import validation_of
from sparkdeep.spark.fit.settings import FitSettings
from sparkdeep.spark.ingest.ingest import (
    Ingested,
    dealt,
    paths_of,
    read_manifests,
    shards_of,
)
from sparkdeep.spark.ingest.tasks import MANIFEST_COLUMNS, RedealJob, manifests_of, redeal_task
from sparkdeep.spark.session.jobs import SparkJob, mapped

__all__ = ["ShardSource"]

_LOG = logging.getLogger("sparkdeep")
_INGEST_TIMEOUT_S: Final = 24 * 3600.0


@final
class ShardSource:
    """The shards of one fit; nothing runs before `ingest`, except the count of rows by `deal_key`.

    Args:
        dataset: the rows.
        settings: of the fit.
        schema: before any row was seen.
        run: the run's id.
        profile: of its stages, or None.
        on_busy: called while ingest is at work.
    """

    def __init__(
        self,
        dataset: DataFrame,
        settings: FitSettings,
        schema: Schema,
        *,
        run: str,
        profile: Any,
        on_busy: Callable[[], None],
    ) -> None:
        self._dataset = dataset
        self._spark: SparkSession = dataset.sparkSession
        self._settings = settings
        self._schema = schema
        self._run = run
        self._profile = profile
        self._on_busy = on_busy
        self._jobs = 0
        self._shared: tuple[Ingested, tuple[tuple[str, dict[str, int]], ...]] | None = None
        """With `shard_dir`: what the first ingest learned, and where its shards lie for all executors to read."""
        self.num_workers = settings.run.num_tasks
        """How many shards."""
        self.frame = self._made()
        """Persisted, one manifest row per shard."""

    def _made(self) -> DataFrame:
        settings = self._settings
        if self._shared is not None and self.num_workers != len(self._shared[1]):
            return self._redealt(self._shared[0].schema, self._shared[1])
        rows = dealt(
            self._dataset,
            self._schema,
            validation=validation_of(settings),
            num_workers=self.num_workers,
            seed=settings.local.seed,
            deal=settings.deal,
            deal_key=settings.deal_key,
        )
        return shards_of(
            rows,
            self._schema,
            run=self._run,
            decode=settings.decode,
            shard_dir=settings.shard_dir,
            profile=self._profile,
            movable=settings.run.stateless,
        )

    def _redealt(self, schema: Schema, shards: tuple[tuple[str, dict[str, int]], ...]) -> DataFrame:
        """The rows of the existing shards in another number of shards; the source is not read again."""
        assert self._settings.shard_dir is not None
        job = RedealJob(
            run=self._run, schema=schema, shard_dir=self._settings.shard_dir, shards=shards, count=self.num_workers
        )
        tasks = self._spark.range(0, self.num_workers, 1, self.num_workers)
        return mapped(tasks, partial(redeal_task, job), MANIFEST_COLUMNS, barrier=True, profile=self._profile).persist()

    def ingest(self) -> Ingested:
        """Write the shards.

        Raises:
            DataError: what is wrong with the rows.
            ReplicaLostError, ReplicaDiedRepeatedlyError: it failed too often.
        """
        run = self._settings.run
        ledger = FailureLedger(max_retries=run.max_retries)
        while True:
            self._jobs += 1
            tag = f"sparkdeep-{self._run}-ingest-{self._jobs}"
            frame = manifests_of(self.frame) if run.stateless else self.frame
            job = SparkJob(self._spark, frame, tag=tag, description="sparkdeep fit: ingest")
            try:
                rows = job.result(_INGEST_TIMEOUT_S, "ingest", idle_timeout_s=run.open_timeout_s, on_busy=self._on_busy)
                validated = self._settings.validation is not None
                # Every replica must have rows; some of the tasks that keep no state may have none.
                least = 1 if run.stateless else self.num_workers
                ingested = read_manifests(rows, self._schema, least, validated=validated)
                if self._shared is None and self._settings.shard_dir is not None:
                    self._shared = (ingested, paths_of(rows))
                return ingested
            except ReplicaLostError as error:
                ledger.add(error, 0)
                _LOG.warning("ingest, attempt %d of %d failed: %s", len(ledger.running), run.max_retries + 1, error)

    def renew(self) -> None:
        """Ingest anew with the next stage: each task then writes its shard where it runs."""
        _LOG.warning("shards and replicas are no longer in the same places; ingesting a new generation of shards.")
        self.frame.unpersist()
        self.frame = self._made()

    def resize(self, num_workers: int) -> Sequence[ShardFacts]:
        """Make that many shards, from those on shared storage or by another ingest; returns what they hold."""
        self.frame.unpersist()
        self.num_workers = num_workers
        self.frame = self._made()
        return self.ingest().facts

    def close(self) -> None:
        """Release the persisted manifest; a session that was stopped has done so already."""
        try:
            self.frame.unpersist()
        except Exception as error:  # noqa: BLE001 (it must not hide the fit's own outcome; it is logged)
            first_line = str(error).partition("\n")[0]
            _LOG.warning("the shards' manifest could not be unpersisted: %s: %s", type(error).__name__, first_line)
