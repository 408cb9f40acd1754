"""What has failed in a run, where, and whether repeating it again makes sense."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, final

from sparkdeep.errors import ReplicaDiedError, ReplicaDiedRepeatedlyError, ReplicaLostError
from sparkdeep.metrics import FailureRecord

__all__ = ["FailureLedger"]

_LOG = logging.getLogger("sparkdeep")
_BAD_HOST: Final = 3


@final
@dataclass(kw_only=True)
class FailureLedger:
    """Counts attempts that failed since the run last got further, and failures by host over the whole run.

    Spark's own excludeOnFailure never hears of a failed barrier task, so that a bad host is noticed here.
    """

    max_retries: int
    running: list[ReplicaLostError] = field(default_factory=list)
    """Attempts that failed since the run last got further."""
    by_host: Counter[str] = field(default_factory=Counter)
    """Failures by host, over the whole run."""
    _told: list[FailureRecord] = field(default_factory=list)

    def progressed(self) -> None:
        """The run got further than ever before."""
        self.running.clear()

    def take(self) -> list[FailureRecord]:
        """What failed since this was asked last."""
        told, self._told = self._told, []
        return told

    def add(self, error: ReplicaLostError, round_number: int) -> None:
        """Note a failed attempt.

        Raises:
            ReplicaDiedRepeatedlyError: the same replica died in the attempt before.
            ReplicaLostError: `error` itself, when it was the last attempt.
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
