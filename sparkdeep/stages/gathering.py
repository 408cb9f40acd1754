"""One round at the driver: the order out to every replica, the headers admitted, the updates collected, the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, final

from torch import Tensor

from sparkdeep import seams
from sparkdeep.protocol.messages import Saved, Update, parse, to_header
from sparkdeep.protocol.orders import Order, RoundResult, Traffic, mean_loss
from sparkdeep.protocol.refusals import common_sections
from sparkdeep.protocol.wire import Buffer
from sparkdeep.stages.admission import Admission
from sparkdeep.stages.collector import Collector, Round
from sparkdeep.stages.driver_link import DriverLink
from sparkdeep.tensors.parameters import raw_bytes
from sparkdeep.tensors.state_dicts import pack_tensors

__all__ = ["Gathering"]

_ROOM_TO_GROW: Final = 16 << 20
"""By so many bytes buffers may grow in a round."""


@final
class Gathering:
    """Collects one round's updates; `exchange` runs in one thread a replica.

    Args:
        given: the round.
        collector: of its updates.
    """

    def __init__(self, given: Round, collector: Collector) -> None:
        self._given = given
        self._buffers = pack_tensors(given.start.buffers)
        self._collector = collector
        self._admission = Admission(given.num_replicas, given.check, given.work.round, self._prepare, given.plane.terms)
        self._sections: list[str] = []
        self._weights: list[float] = []
        self._received: dict[int, dict[str, Tensor]] = {}
        self._saved: dict[int, Saved] = {}
        self._traffic: dict[int, Traffic] = {}

    def exchange(self, replica: int, link: DriverLink) -> None:
        """Send the order, and take in the replica's update; see `Collector.take` for what is raised."""
        connection = link.connection
        sent, received = connection.sent_bytes, connection.received_bytes
        self._saved[replica] = Saved(bytes=0, seconds=0.0)
        link.begin_round(self._given.work.deadline_s)
        if link.settle(lambda: self._admission.closed_without(replica)):
            self._ask(replica, link)
        self._traffic[replica] = Traffic(
            sent_bytes=connection.sent_bytes - sent, received_bytes=connection.received_bytes - received
        )

    def _ask(self, replica: int, link: DriverLink) -> None:
        link.waiting = False
        link.buffer_limit_bytes = 2 * (len(self._buffers) + self._given.plane.fixed_bytes) + _ROOM_TO_GROW
        header, bodies = self.order(replica)
        link.send("train", header, *bodies)
        taken = self._collector.take(link, self._admission)
        if taken is None:
            return
        update, buffers = taken
        if update.weight > 0:
            self._received[replica] = buffers
        self._saved[replica] = parse(Saved, link.expect("saved").header)
        link.kept_round = self._given.work.round

    def order(self, replica: int) -> tuple[dict[str, Any], list[Buffer]]:
        """The header and the bodies of a replica's order."""
        given = self._given
        start, previous = given.start, given.start.previous if given.fresh else None
        order = Order(
            spec=given.work.specs[replica],
            clock=given.work.clocks[replica],
            ahead=given.ahead,
            may_undo=given.plane.terms.may_undo,
            previous=previous is not None,
            sections=start.sections,
            buffer_bytes=len(self._buffers),
        )
        order, parameters = self._collector.order(replica, order)
        before = [] if previous is None else [raw_bytes(previous)]
        return to_header(order), [*before, *parameters, raw_bytes(start.inner), self._buffers]

    def _prepare(self, updates: list[Update]) -> None:
        seams.reach("average", round_number=self._given.work.round)
        self._sections = common_sections(updates)
        self._weights = [update.weight for update in updates]
        self._collector.prepare(updates, len(self._sections))

    @property
    def held(self) -> bool:
        """Whether replicas hold the mean, and the next order need not bring it."""
        return self._collector.held

    def result(self, seconds: float) -> RoundResult:
        """The mean, once every replica's exchange has ended well."""
        updates = self._admission.updates
        start, count = self._given.start, self._given.num_replicas
        mean, pooled = start.parameters if start.base is None else start.base, start.buffers
        if any(self._weights):
            mean = self._collector.result()
            buffers_of = [self._received.get(i, start.buffers) for i in range(count)]
            pooled = self._given.plane.averaging.pool(updates, buffers_of, start.buffers)
        numel = self._given.plane.averaging.layout.numel
        return RoundResult(
            mean=mean[:numel],
            buffers=pooled,
            sections=self._sections,
            inner=mean[numel:],
            loss=mean_loss(updates),
            updates=updates,
            saved=[self._saved[i] for i in range(count)],
            seconds=seconds,
            dropped={i: verdict for i, verdict in self._admission.verdicts.items() if verdict != "counted"},
            passed_over=self._admission.passed_over,
            rolled_back=self._admission.rolled_back,
            traffic=_summed(list(self._traffic.values())),
            arrivals=self._collector.log,
        )


def _summed(parts: Sequence[Traffic]) -> Traffic:
    return Traffic(
        sent_bytes=sum(part.sent_bytes for part in parts), received_bytes=sum(part.received_bytes for part in parts)
    )
