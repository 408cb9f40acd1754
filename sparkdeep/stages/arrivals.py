"""An asynchronous window at the driver: each push is applied when it comes, none on parameters that are too old."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Final, final

from torch import Tensor

from sparkdeep.errors import ProtocolError
from sparkdeep.optim.asynchronous import OnArrival, Turns
from sparkdeep.protocol.messages import Update, Visit, parse
from sparkdeep.protocol.orders import Order
from sparkdeep.protocol.refusals import check_update, not_finite
from sparkdeep.protocol.wire import Buffer, Frame
from sparkdeep.stages.admission import Admission
from sparkdeep.stages.collector import Round, Taken
from sparkdeep.stages.driver_link import DriverLink
from sparkdeep.tensors.parameters import raw_bytes

__all__ = ["Arrivals"]

_LOOK_S: Final = 0.25


@final
class Arrivals:
    """A `Collector` that applies the pushes of a window.

    All that decides a bit of the parameters happens under one lock, in the order that `log` tells: a push is applied, and what
    a replica fetches with it is copied, before anything else is. The same order gives the same bits. Who may come when is
    the account of `Turns`.

    Args:
        outer: the step for each push, in all windows of the run.
        given: this one; pushes move its start's parameters.
    """

    held = False

    def __init__(self, outer: OnArrival, given: Round) -> None:
        self._given = given
        self._outer = outer
        self._parameters = given.start.parameters.detach()
        # All begin where the window does, though pushes of the first may have been applied when the last one is sent it.
        self._begin = self._parameters.clone()
        number = given.work.round
        recorded = outer.recorded.get(number)
        self._turns = Turns(given.num_replicas, outer.rule, round_number=number, recorded=recorded)
        self._news = threading.Condition()

    @property
    def log(self) -> list[list[int]]:
        """[replica, staleness] in the order of arrival."""
        return self._turns.log

    def order(self, replica: int, order: Order) -> tuple[Order, list[Buffer]]:
        """How often to come in, and the parameters at the window's start."""
        del replica
        rule = self._outer.rule
        return replace(order, n_fetch=rule.n_fetch, n_push=rule.n_push), [raw_bytes(self._begin)]

    def take(self, link: DriverLink, admission: Admission) -> Taken | None:
        """Serve a replica until its window ends; its update's vector is its last push."""
        replica, host = link.hello.replica, link.hello.host
        # Each has its own room, so that a slow link holds up no other.
        room = self._given.plane.averaging.kept(replica, self._parameters.numel(), self._parameters.dtype)
        frame = self._follow(link, room)
        update = parse(Update, frame.header)
        link.waiting = True
        check_update(replica, host, update, self._given.work.round)
        buffers: dict[str, Tensor] = {}
        if update.weight == 0:
            with self._news:
                self._turns.leave(replica)
                self._news.notify_all()
        else:
            body = link.body(frame, update, raw_bytes(room).nbytes)
            body.fill(room)
            buffers = body.buffers(update.buffer_bytes)
            last = Visit(round=update.round, steps=update.steps, pushes=True, fetches=False, finite=True)
            self._come(replica, last, room, last=True)
        admission.enter(replica, host, update)
        return update, buffers

    def _follow(self, link: DriverLink, room: Tensor) -> Frame:
        """Until the frame of its update comes."""
        replica = link.hello.replica
        spec = self._given.work.specs[replica]
        while True:
            frame = link.await_update(lambda: False, "visit")
            assert frame is not None, "nobody gives up"
            if frame.kind != "visit":
                return frame
            visit = parse(Visit, frame.header)
            inside = self._turns.steps[replica] < visit.steps < spec.num_steps and not spec.skip
            if visit.round != spec.round or not inside or not (visit.pushes or visit.fetches):
                raise ProtocolError(f"{link.who} came in with {visit} in round {spec.round}.")
            if not visit.finite:
                raise not_finite(replica, link.hello.host, spec.round)
            if visit.pushes:
                link.read_change(frame, room)
            elif frame.body_bytes:
                raise ProtocolError(f"{link.who} sent {frame.body_bytes} bytes with a visit that pushes nothing.")
            link.waiting = True
            self._come(replica, visit, room)
            link.go_on(room if visit.fetches else None)

    def _come(self, replica: int, visit: Visit, room: Tensor, *, last: bool = False) -> None:
        with self._news:
            while not self._turns.may_come(replica, visit, last=last):
                if not self._news.wait(timeout=_LOOK_S):
                    self._given.check()
            pushed = self._turns.come(replica, visit)
            if visit.pushes:
                self._outer.apply(room, self._given.work.clocks[replica] + pushed, visit.steps - pushed)
            if visit.fetches:
                room.copy_(self._parameters)
            if last:
                self._turns.leave(replica)
            self._news.notify_all()

    def prepare(self, updates: list[Update], num_sections: int) -> None:
        """Nothing: it was all applied."""

    def result(self) -> Tensor:
        """Where the pushes have moved the parameters."""
        return self._parameters
