"""Who starts replicas, and the stage that is on its way: two interfaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sparkdeep.protocol.messages import ShardFacts, Ticket

__all__ = ["Launcher", "RunningStage"]


class RunningStage(Protocol):
    """Replicas on their way to the coordinator, or at work."""

    def failure(self) -> BaseException | None:
        """Why the stage failed, as far as its launcher knows; None while it runs or after it ended well."""

    def finish(self, timeout_s: float) -> None:
        """Wait for the replicas to end after they were told to stop; cancels what is left."""

    def cancel(self) -> None:
        """End the replicas now; returns at once."""


class Launcher(Protocol):
    """Starts one replica per shard."""

    @property
    def num_replicas(self) -> int:
        """How many."""

    def launch(self, ticket: Ticket, description: str) -> RunningStage:
        """Start all replicas; each dials the ticket's address and says hello."""

    def renew(self) -> None:
        """Make the shards anew before the next launch: a replica did not find its own."""

    def slots(self) -> int | None:
        """How many replicas could run at the same time, whether their slots are busy or not; None where nobody knows."""

    def resize(self, num_replicas: int) -> Sequence[ShardFacts]:
        """Deal the rows anew, to so many replicas; what their shards hold.

        Raises:
            ReplicaLostError: it could not be done now, but perhaps later.
        """
