"""What makes a run asynchronous: how often a replica fetches and pushes, and how old what it pushes may be."""

from __future__ import annotations

from dataclasses import dataclass

from sparkdeep.checks import at_least

__all__ = ["Asynchronous"]


@dataclass(frozen=True)
class Asynchronous:
    """Replicas fetch and push on their own, and the driver applies each push when it arrives (Downpour; Dean et al., 2012).

    A round is a window: `sync_every` local steps of every replica, or `time_budget_s` seconds, in which nobody waits for anybody;
    at its end all have arrived, so that it can be scored, kept and repeated.
    """

    n_fetch: int = 1
    """Local steps between fetches of the global parameters."""
    n_push: int = 1
    """Local steps between pushes of what the replica changed since its last push."""
    max_staleness: int | None = None
    """So many pushes of others may be applied between a replica's fetch and its push; faster replicas wait for it to come.
    None: any number within the window."""

    def __post_init__(self) -> None:
        for name in ("n_fetch", "n_push"):
            at_least(f"Asynchronous.{name}", getattr(self, name), 1)
        if self.max_staleness is not None:
            at_least("Asynchronous.max_staleness", self.max_staleness, 0)

    def pushes_before_fetch(self, steps: int) -> int:
        """How often a replica that has done so many steps of a window pushes before it has fetched again, at most.

        Its next fetch may come with a push, or its window may end before with one.
        """
        fetch = (steps // self.n_fetch + 1) * self.n_fetch
        return (fetch - 1) // self.n_push - steps // self.n_push + 1

    def least_staleness(self, num_replicas: int) -> int:
        """The smallest bound that can be kept: every other replica may push as often as one does between its fetches."""
        most = max(self.pushes_before_fetch(cycle * self.n_fetch) for cycle in range(self.n_push))
        return (num_replicas - 1) * most
