"""The star: every replica is sent the parameters by the driver, which adds their updates up as they arrive."""

from __future__ import annotations

from dataclasses import replace
from typing import final

from torch import Tensor

from sparkdeep.protocol.messages import Update, parse
from sparkdeep.protocol.orders import Order
from sparkdeep.protocol.wire import Buffer, Frame
from sparkdeep.stages.admission import Admission
from sparkdeep.stages.collector import Round, Taken
from sparkdeep.stages.driver_link import DriverLink
from sparkdeep.tensors.mean import Combining
from sparkdeep.tensors.parameters import raw_bytes

__all__ = ["Star"]


@final
class Star:
    """A `Collector` whose bodies follow their headers: none is in the sum before the headers of all were admitted.

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
