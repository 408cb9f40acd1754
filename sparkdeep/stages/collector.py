"""One round of a stage, and what collects its updates: the star; a ring, or what takes them as they arrive, in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, final

from torch import Tensor

from sparkdeep.optim.averaging import Averaging
from sparkdeep.protocol.messages import RoundSpec, Update, parse
from sparkdeep.protocol.orders import Globals, Order, RoundWork
from sparkdeep.protocol.wire import Buffer, Frame
from sparkdeep.stages.admission import Admission, Terms
from sparkdeep.stages.driver_link import DriverLink
from sparkdeep.tensors.mean import Combining
from sparkdeep.tensors.parameters import raw_bytes

__all__ = ["Collector", "Plane", "Round", "Star", "Taken"]

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


@final
class Star:
    """Every replica is sent the parameters by the driver, which adds their updates up as they arrive.

    Bodies follow their headers: none is in the sum before the headers of all were admitted.

    Args:
        given: the round.
    """

    held = False

    def __init__(self, given: Round) -> None:
        self._given = given
        self._total: Combining | None = None
        self.log: list[list[int]] = []

    def order(self, replica: int, order: Order) -> tuple[Order, list[Buffer]]:
        """What changed, for replicas that know the parameters of the round before, or all parameters."""
        del replica
        start = self._given.start
        if start.encoded is None or self._given.fresh:
            return order, [raw_bytes(start.parameters)]
        return replace(order, parameters="change"), [start.encoded]

    def take(self, link: DriverLink, admission: Admission) -> Taken | None:
        """See `Collector`; a replica that the round closes without goes back to where it began."""
        replica, number = link.hello.replica, self._given.work.round
        frame = link.await_update(lambda: admission.closed_without(replica))
        if frame is None:
            link.undo(number)
            return None
        update = parse(Update, frame.header)
        link.waiting = True
        verdict = admission.enter(replica, link.hello.host, update)
        if verdict in {"late", "rolled back"}:
            link.leave(frame)
            link.undo(number)
            if verdict == "rolled back":
                link.settle(lambda: False)
            return None
        # Of one that is not finite nothing comes: it has gone back by itself.
        return update, self._add(link, frame, update) if update.weight > 0 else {}

    def _add(self, link: DriverLink, frame: Frame, update: Update) -> dict[str, Tensor]:
        assert self._total is not None
        averaging = self._given.plane.averaging
        body = link.body(frame, update, averaging.vector_bytes(update))
        return averaging.add(self._total, update, body, self._given.check)

    def prepare(self, updates: list[Update], num_sections: int) -> None:
        """Make what the bodies are added to."""
        given = self._given
        self._total = given.plane.averaging.total(updates, given.start, given.work.rows, num_sections)

    def result(self) -> Tensor:
        """The mean."""
        assert self._total is not None
        return self._total.mean()
