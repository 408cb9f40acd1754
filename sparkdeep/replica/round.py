"""The replica's end of a round: orders in, local work, updates out; one after the other, or overlapped."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable
from typing import Final, final

import torch

from sparkdeep.errors import ProtocolError
from sparkdeep.protocol.messages import TRIAL_BYTES, RoundSpec, Saved, Update, field, to_header
from sparkdeep.protocol.orders import Order
from sparkdeep.protocol.refusals import MAX_SECTIONS
from sparkdeep.protocol.wire import Frame
from sparkdeep.replica.link import ReplicaLink
from sparkdeep.replica.overlapping import AbandonedError, Courier, Pace
from sparkdeep.replica.replica import Replica
from sparkdeep.replica.ring import Ring
from sparkdeep.replica.update import LocalResult
from sparkdeep.replica.window import ReplicaWindow
from sparkdeep.storage.disks import StateFiles, own_files
from sparkdeep.tensors.parameters import raw_bytes

__all__ = ["ReplicaRounds", "keep_state"]


_LARGEST_RING: Final = 1 << 16


def keep_state(states: StateFiles, round_number: int, data: bytes) -> None:
    """Write a state to this executor's disk.

    Raises:
        ReplicaLostError: the disk failed.
    """
    with own_files("it kept the replica's state"):
        states.write(round_number, data)


@final
class ReplicaRounds:
    """Does what `train` orders ask for.

    Args:
        link: to the driver.
        replica: the model and its data.
        states: where its state is kept.
        keep: whether to keep it after every round.
    """

    def __init__(self, link: ReplicaLink, replica: Replica, states: StateFiles, *, keep: bool) -> None:
        self._link = link
        self._replica = replica
        self._states = states
        self._keep = keep
        self._pace = Pace(replica.exchange.fragments)
        self._before: tuple[RoundSpec, bytes] | None = None
        """The round that is under way or was just done, and the state before it, where it may be undone."""
        self.ring: Ring | None = None
        """Set when the replicas of the stage add their updates up among themselves."""

    def join_ring(self, size: int, timeout_s: float) -> None:
        """Connect to the other replicas of the stage.

        Raises:
            ReplicaLostError: not all of them can be reached.
        """
        replica = self._replica
        if not replica.number < size <= _LARGEST_RING or not 0 < timeout_s < threading.TIMEOUT_MAX:
            raise ProtocolError(f"replica {replica.number} is to join a ring of {size} within {timeout_s} s.")
        if self.ring is not None:
            self.ring.close()
        self.ring = Ring(
            self._link,
            replica.number,
            size,
            host=self._link.local_host,
            device=replica.device,
            timeout_s=timeout_s,
        )

    def try_ring(self, numel: int) -> None:
        """Add up and hand round a vector of zeros, (numel,) float32, with the other replicas."""
        if self.ring is None or not 0 < 4 * numel <= TRIAL_BYTES:
            raise ProtocolError(f"the driver wants to try a ring with {numel} elements, or before one was formed.")
        vector = torch.zeros(numel)
        self.ring.gather(self.ring.reduce(vector, numel, [1.0] * self.ring.size), vector)

    def run(self, frame: Frame) -> Frame | None:
        """Do the round of a `train` frame; returns the command that broke off a round begun ahead, if one did."""
        order, inner, buffers = self._take(frame, None)
        assert order.spec is not None
        replica = self._replica
        replica.catch_up(order.clock)
        self._before = (order.spec, replica.save_state()) if order.may_undo else None
        replica.begin_round(buffers)
        replica.exchange.arrived()
        replica.load_inner_state(order.sections, inner)
        try:
            result = self._result(order, order.spec)
        except AbandonedError:
            self.go_back(self._link.undone)
            return None
        if replica.exchange.overlap:
            return self._go_on(order, result)
        if self.ring is None:
            self._link.update(result)
        else:
            self._add_up(result)
        if (undone := self._link.undone) is not None:
            self.go_back(undone)
            return None
        self._report(order.spec.round)
        return None

    def _result(self, order: Order, spec: RoundSpec) -> LocalResult:
        """Do the round; one that may be undone is broken off when the driver says so, and goes back if it is not finite."""
        replica = self._replica
        if spec.skip:
            replica.skip(spec)
            return LocalResult.nothing(Update.absent(spec.round), replica.exchange, replica.number)
        if order.n_fetch or order.n_push:
            window = ReplicaWindow(self._link, replica, n_fetch=order.n_fetch, n_push=order.n_push)
            return window.train(spec)
        if self._before is None:
            return replica.train(spec)
        result = replica.train(spec, self._unless_undone)
        if result.update.finite:
            return result
        self._restore()
        # Where it was before the round, it has nothing that could be counted.
        header = dataclasses.replace(Update.absent(spec.round, result.update), finite=False, steps=result.update.steps)
        return LocalResult.nothing(header, replica.exchange, replica.number)

    def _unless_undone(self, share: float) -> None:
        if share < 1.0 and self._link.look():
            raise AbandonedError

    def go_back(self, round_number: int | None) -> None:
        """Be where a replica is that the round went on without, and say so.

        Raises:
            ProtocolError: it cannot be undone.
        """
        if self._before is None or self._before[0].round != round_number:
            raise ProtocolError(f"the driver wants round {round_number} undone, which this replica is not in.")
        self._restore()
        if self._keep:
            keep_state(self._states, self._before[0].round, self._replica.save_state())
        self._link.send("undone", {"round": round_number})

    def _restore(self) -> None:
        assert self._before is not None
        spec, state = self._before
        self._replica.load_state(state)
        self._replica.forget_logged()
        self._replica.skip(spec)

    def _go_on(self, order: Order, result: LocalResult) -> Frame | None:
        """Deliver updates while the rounds after them are trained, until none is to be begun ahead."""
        replica = self._replica
        while order.ahead is not None:
            result = result.encoded()  # what the code loses belongs to the state of this round
            state = replica.save_state()
            self._pace.reach(0.0)
            courier = Courier(self._errand(order.ahead, result, state), lambda back: isinstance(back, Frame))
            try:
                replica.begin_round(None)
                result = replica.train(order.ahead, self._between(courier))
            except AbandonedError:
                pass  # what it trains in vain is undone below
            finally:
                self._pace.reach(1.0)  # nothing is held back any more
            back = courier.wait()
            if isinstance(back, Frame):
                replica.load_state(state)
                return back
            replica.exchange.arrived()
            order = back
        self._link.update(result)
        self._report(result.update.round)
        return None

    def _between(self, courier: Courier[Order | Frame]) -> Callable[[float], None]:
        def between(share: float) -> None:
            self._pace.reach(share)
            if share == 1.0:
                courier.wait()  # the last update must be away before this one is written over it
            courier.check()

        return between

    def _errand(self, ahead: RoundSpec, result: LocalResult, state: bytes) -> Callable[[], Order | Frame]:
        """Send an update, keep the state after it, and take in the next order."""

        def errand() -> Order | Frame:
            self._link.update(result, pace=self._pace)
            self._report(result.update.round, state)
            frame = self._link.command()
            if frame.kind != "train":
                return frame
            following, _, _ = self._take(frame, self._pace)
            if following.spec != ahead:
                raise ProtocolError(f"{ahead} was begun ahead, but the driver orders {following.spec}.")
            return following

        return errand

    def _report(self, round_number: int, state: bytes | None = None) -> None:
        """The replica's part of a round is done; `state`: after it, if it was saved already."""
        began, data = time.perf_counter(), b""
        if self._keep:
            data = self._replica.save_state() if state is None else state
            keep_state(self._states, round_number, data)
        self._link.send("saved", to_header(Saved(bytes=len(data), seconds=time.perf_counter() - began)))

    def _add_up(self, result: LocalResult) -> None:
        """Send the header; once all are admitted, take part in the sum and send this replica's part of the mean."""
        assert self.ring is not None
        self._link.update(result, vector=False)
        frame = self._link.command()
        if frame.kind != "reduce":
            raise ProtocolError(f"expected 'reduce' after the update's header, got {frame.kind!r}.")
        weights: list[float] = field(frame.header, "weights", list[float])
        if not weights:
            return
        sections: int = field(frame.header, "sections", int)
        if len(weights) != self.ring.size or not 0 <= sections <= MAX_SECTIONS or not 0 < sum(weights) < math.inf:
            raise ProtocolError(
                f"{len(weights)} weights and {sections} sections are no sum of a ring of {self.ring.size}."
            )
        numel = (1 + sections) * self._replica.layout.numel
        part = self.ring.reduce(result.vector, numel, weights)
        self._link.send_body("part", raw_bytes(part))
        if field(frame.header, "hold", bool):
            # The next round starts from the mean: it is here before the driver could send it.
            self.ring.gather(part, self._replica.exchange.known)

    def _take(self, frame: Frame, pace: Pace | None) -> tuple[Order, torch.Tensor, bytes]:
        """An order, once its parameters were taken in; with the averaged optimizer state and the buffers that follow them."""
        link, replica, exchange = self._link, self._replica, self._replica.exchange
        order = Order.of(frame.header)
        if order.spec is None:
            raise ProtocolError("the driver orders a round, and does not say which.")
        if self.ring is not None and not order.in_ring:
            self.ring.close()  # it was tried, and the star was faster
            self.ring = None
        if self.ring is None and order.in_ring:
            raise ProtocolError("the driver orders a round of a ring that was not formed.")
        if order.previous:
            link.read_vector(exchange.known)
        if order.parameters == "change":
            link.read_change(exchange, pace)
        elif order.parameters == "whole":
            link.read_vector(exchange.arriving, pace)
        elif order.parameters == "part":
            assert self.ring is not None
            start, stop = self.ring.bounds(replica.layout.numel)
            link.read_vector(exchange.arriving[start:stop])
            self.ring.gather(exchange.arriving[start:stop], exchange.arriving)
        inner = replica.layout.empty(len(order.sections))
        link.read_vector(inner)
        return order, inner, link.read_bytes(order.buffer_bytes)
