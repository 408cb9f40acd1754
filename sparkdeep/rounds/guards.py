"""Guards of a run: what has failed and whether to try again, how long a round may take, and whether its loss explodes."""

from __future__ import annotations

import logging
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, final

from sparkdeep.errors import DivergedError, ReplicaDiedError, ReplicaDiedRepeatedlyError, ReplicaLostError
from sparkdeep.settings.run import RunSettings
from sparkdeep.tracking.records import FailureRecord, RoundRecord

__all__ = ["FailureLedger", "check_divergence", "round_deadline_s"]

_LOG = logging.getLogger("sparkdeep")
_BAD_HOST: Final = 3


@final
@dataclass(kw_only=True)
class FailureLedger:
    """Counts attempts that failed since the run last made progress, and failures by host over the whole run.

    Spark's own excludeOnFailure does not count failed barrier tasks, so a bad host is noticed here.
    """

    max_retries: int
    running: list[ReplicaLostError] = field(default_factory=list)
    """Attempts that failed since the run last made progress."""
    by_host: Counter[str] = field(default_factory=Counter)
    """Failures by host, over the whole run."""
    _told: list[FailureRecord] = field(default_factory=list)

    def progressed(self) -> None:
        """The run made progress: it got further than ever before."""
        self.running.clear()

    def take(self) -> list[FailureRecord]:
        """What has failed since the last call."""
        told, self._told = self._told, []
        return told

    def add(self, error: ReplicaLostError, round_number: int) -> None:
        """Note a failed attempt.

        Raises:
            ReplicaDiedRepeatedlyError: the same replica died in the attempt before.
            ReplicaLostError: `error` itself, if that was the last attempt.
        """
        first_line = str(error).partition("\n")[0][:500]
        self._told.append(
            FailureRecord(error=type(error).__name__, message=first_line, replica=error.replica, host=error.host)
        )
        if error.host is not None:
            self.by_host[error.host] += 1
            if self.by_host[error.host] == _BAD_HOST:
                _LOG.warning("host %s has failed %d times in this run: %s", error.host, _BAD_HOST, self.summary())
        before = self.running[-1] if self.running else None
        self.running.append(error)
        both_died = isinstance(error, ReplicaDiedError) and isinstance(before, ReplicaDiedError)
        if both_died and before is not None and error.replica is not None and error.replica == before.replica:
            raise self._repeatedly(error, before, round_number) from error
        if len(self.running) > self.max_retries:
            error.add_note(
                f"{len(self.running)} attempts failed, and max_retries={self.max_retries}. Failures by host: {self.summary()}."
            )
            raise error

    def summary(self) -> str:
        """Failures by host, for messages."""
        return ", ".join(f"{host} {count}" for host, count in self.by_host.most_common()) or "not known"

    def _repeatedly(
        self, error: ReplicaLostError, before: ReplicaLostError, round_number: int
    ) -> ReplicaDiedRepeatedlyError:
        assert error.replica is not None
        hosts = [host or "an unknown host" for host in (before.host, error.host)]
        return ReplicaDiedRepeatedlyError(
            f"replica {error.replica} died twice running in round {round_number}, on {hosts[0]} and then on {hosts[1]}: out of "
            "memory likely, as its shard is the same each time. Raise spark.executor.memoryOverhead, lower batch_size, or use "
            f"more and smaller shards (num_workers). The last time: {error}",
            replica=error.replica,
            hosts=hosts,
        )


_FACTOR: Final = 10.0
_LOOKED_AT: Final = 50


def round_deadline_s(records: Sequence[RoundRecord], floor_s: float, num_steps: int = 0) -> float | None:
    """Seconds after which a round counts as hung; None for the first, for which there is nothing to compare with.

    Args:
        records: of the run so far; the last fifty are used.
        floor_s: the least number of seconds.
        num_steps: local steps of the round, where its length is known and may differ from before: one with more steps
            than those before it is given proportionally more time.
    """
    last = records[-_LOOKED_AT:]
    if not last:
        return None
    usual = statistics.median(record.compute_seconds + record.exchange_seconds for record in last)
    steps = statistics.median(max((part.steps for part in record.replicas), default=0) for record in last)
    return max(floor_s, _FACTOR * usual * max(1.0, num_steps / max(steps, 1)))


def check_divergence(loss: float, records: Sequence[RoundRecord], settings: RunSettings, round_number: int) -> None:
    """Refuse a round whose loss exceeds `divergence_factor` times the lowest so far.

    Args:
        loss: of the round; NaN where it has none.
        records: of the rounds before.
        settings: of the fit.
        round_number: of the round.

    Raises:
        DivergedError: naming the losses and the newest round with a checkpoint.
    """
    past = [record.loss for record in records if math.isfinite(record.loss)]
    if settings.divergence_factor is None or not past or min(past) <= 0 or math.isnan(loss):
        return
    if loss <= settings.divergence_factor * min(past):
        return
    kept = [record.round for record in records if record.checkpoint_bytes]
    newest = kept[-1] if kept else None
    raise DivergedError(
        f"round {round_number}: the loss is {loss:.6g}, more than divergence_factor={settings.divergence_factor:g} times the "
        f"lowest so far, {min(past):.6g}: the run diverges, and stopped before this round counted. "
        + (
            f"The newest checkpoint is of round {newest}: the same call with another learning rate or clip_grad_norm= in a new "
            "checkpoint_dir, and warm_start= the model saved from it, goes on."
            if newest is not None
            else "There is no checkpoint: set checkpoint_dir= to keep good rounds. Lower the learning rate, or set clip_grad_norm=."
        ),
        round_number=round_number,
        checkpoint=newest,
    )
