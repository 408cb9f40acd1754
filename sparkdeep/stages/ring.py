"""The ring at the driver: where replicas meet to form it, and what collects the parts of the mean that each of them sends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final, final

import torch
from torch import Tensor

from sparkdeep.errors import ProtocolError, ReplicaLostError
from sparkdeep.protocol.messages import Update, field, parse
from sparkdeep.protocol.orders import Order
from sparkdeep.protocol.wire import Buffer
from sparkdeep.stages.admission import Admission
from sparkdeep.stages.collector import Round, Taken
from sparkdeep.stages.driver_link import DriverLink
from sparkdeep.tensors.mean import Partition, reduced_weights
from sparkdeep.tensors.parameters import raw_bytes

__all__ = ["Meeting", "Ring"]

_MOST_KEYS: Final = 1 << 16
_LONGEST_VALUE: Final = 1 << 16
_LONGEST_KEY: Final = 1 << 10
_MOST_BYTES: Final = 1 << 26


@final
class Meeting:
    """Where the replicas of a stage tell each other how they can be reached: keys and values.

    Nothing listens for it but the coordinator, which has checked the token.

    Args:
        timeout_s: for a value to come.
        check: called while one waits; raises to give up.
    """

    def __init__(self, *, timeout_s: float, check: Callable[[], None]) -> None:
        self._timeout_s = timeout_s
        self._check = check
        self._values: dict[str, str] = {}
        self._stored = 0
        self._news = threading.Condition()

    def host(self, link: DriverLink, size: int) -> None:
        """Have a replica join the ring; returns when its connections to all others stand.

        Raises:
            ReplicaLostError: it could not reach them in time.
        """
        link.waiting = False
        link.connection.send("ring", {"size": size, "timeout_s": self._timeout_s})
        while True:
            frame = link.expect("put", "get", "formed", timeout_s=self._timeout_s)
            if frame.kind == "formed":
                link.waiting = True
                return
            key = field(frame.header, "key", str)
            if frame.kind == "put":
                self._put(key, field(frame.header, "value", str))
            else:
                link.connection.send("value", {"value": self._get(key, link.who)})

    def _put(self, key: str, value: str) -> None:
        with self._news:
            self._stored += len(key) + len(value)
            too_long = len(key) > _LONGEST_KEY or len(value) > _LONGEST_VALUE or self._stored > _MOST_BYTES
            if too_long or len(self._values) >= _MOST_KEYS:
                raise ProtocolError(
                    f"a replica wants to store {len(value)} characters beside {len(self._values)} values."
                )
            self._values[key] = value
            self._news.notify_all()

    def _get(self, key: str, who: str) -> str:
        deadline = time.monotonic() + self._timeout_s
        with self._news:
            while key not in self._values:
                if not self._news.wait(timeout=0.25):
                    self._check()
                if time.monotonic() > deadline:
                    raise ReplicaLostError(f"{who} waited {self._timeout_s:g} s for another replica to join the ring.")
            return self._values[key]


@final
class Ring:
    """A `Collector` of parts: a replica is sent its part of the parameters, and sends its part of the mean.

    Args:
        given: the round.
    """

    def __init__(self, given: Round) -> None:
        self._given = given
        self._mean = torch.empty(0)
        self._num_sections = 0
        self._weights: list[float] = []
        self.log: list[list[int]] = []

    @property
    def held(self) -> bool:
        """Whether replicas hand the mean round, as the next round starts from it: averaging has nothing to do to it."""
        return not self._given.plane.averaging.wide and not self._num_sections and bool(self._weights)

    def order(self, replica: int, order: Order) -> tuple[Order, list[Buffer]]:
        """The replica's part of the parameters, unless all of them are there."""
        given = self._given
        if given.held:
            return replace(order, parameters="held"), []
        start, stop = Partition(given.plane.averaging.layout.numel, given.num_replicas).bounds(replica)
        return replace(order, parameters="part"), [raw_bytes(given.start.parameters[start:stop])]

    def take(self, link: DriverLink, admission: Admission) -> Taken | None:
        """See `Collector`: its buffers come with the header, and its part once all headers are admitted."""
        frame = link.await_update(lambda: False)
        assert frame is not None, "nobody gives up"
        update = parse(Update, frame.header)
        link.waiting = True
        buffers = link.body(frame, update, 0).buffers(update.buffer_bytes)
        admission.enter(link.hello.replica, link.hello.host, update)
        link.waiting = False
        link.send("reduce", {"weights": self._weights, "sections": self._num_sections, "hold": self.held})
        if self._weights:
            start, stop = Partition(self._mean.numel(), self._given.num_replicas).bounds(link.hello.replica)
            link.read_change(link.expect("part"), self._mean[start:stop])
        link.waiting = True
        return update, buffers

    def prepare(self, updates: list[Update], num_sections: int) -> None:
        """What the sum is to be of."""
        averaging, layout = self._given.plane.averaging, self._given.plane.averaging.layout
        weights = [update.weight for update in updates]
        self._weights = reduced_weights(weights) if any(weights) else []
        self._num_sections = num_sections
        self._mean = averaging.kept("mean", (1 + num_sections) * layout.numel, layout.dtype)

    def result(self) -> Tensor:
        """The mean, of which every replica has sent a part."""
        return self._mean
