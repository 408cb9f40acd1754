"""What a run's rounds have in common, one round of them, and what collects its updates: a star, a ring, or as they arrive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, final

from torch import Tensor

from sparkdeep.optim.averaging import Averaging
from sparkdeep.protocol.messages import RoundSpec, Update
from sparkdeep.protocol.orders import Globals, Order, RoundWork
from sparkdeep.protocol.wire import Buffer
from sparkdeep.stages.admission import Admission, Terms
from sparkdeep.stages.driver_link import DriverLink

__all__ = ["Collector", "Plane", "Round", "Taken"]

Taken = tuple[Update, dict[str, Tensor]]
"""A replica's header and its buffers."""


@final
@dataclass(kw_only=True)
class Plane:
    """How this run's parameters travel; the same for all its rounds."""

    averaging: Averaging
    collector: Callable[[Round], Collector]
    """`Star`, or `Arrivals` of a window; in its place a stage takes `Ring` where that is chosen."""
    terms: Terms = field(default_factory=Terms)
    """When a round closes, and whom it counts."""
    fixed_bytes: int = 0
    """Of frozen parameters, which a replica sends once it has changed them."""


@final
@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of a stage, as its collector is given it."""

    plane: Plane
    work: RoundWork
    start: Globals
    ahead: RoundSpec | None
    """The round that follows if a replica may begin it on its own (`overlap`)."""
    fresh: bool
    """Whether this is the first round of its stage: replicas know no parameters yet."""
    held: bool
    """Whether replicas hold the parameters already, as the round before left them there."""
    num_replicas: int
    check: Callable[[], None]
    """Called while a replica waits for others; raises to give up."""


class Collector(Protocol):
    """Gives out one round's parameters and collects its updates; `order` and `take` run in one thread a replica."""

    @property
    def held(self) -> bool:
        """Whether replicas hold the mean once the round is over: the next order need not bring it."""

    @property
    def log(self) -> list[list[int]]:
        """[replica, staleness] in the order in which replicas came in; empty where they come at the end only."""

    def order(self, replica: int, order: Order) -> tuple[Order, list[Buffer]]:
        """A replica's order with what it says of the parameters, and the parameters."""

    def take(self, link: DriverLink, admission: Admission) -> Taken | None:
        """Take in a replica's update; None if the round goes on without it.

        Raises:
            NonFiniteError, UserCodeError: never mended by repeating.
            ReplicaLostError: the replica went away, is past the deadline, or its update was damaged; the round is void.
        """

    def prepare(self, updates: list[Update], num_sections: int) -> None:
        """All headers are good; called once, between those of the updates that count and their bodies.

        Args:
            updates: in replica order; of one that does not count, with weight 0.
            num_sections: optimizer states that follow the parameters.
        """

    def result(self) -> Tensor:
        """The mean, ((1 + num_sections) * numel,), once every replica that counts was taken."""
