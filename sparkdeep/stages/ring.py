"""The ring at the driver: replicas add their updates up among themselves, and each sends its part of the mean."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from sparkdeep.protocol.messages import Update, parse
from sparkdeep.protocol.orders import Order
from sparkdeep.protocol.wire import Buffer
from sparkdeep.stages.admission import Admission
from sparkdeep.stages.collector import Round, Taken
from sparkdeep.stages.driver_link import DriverLink
from sparkdeep.tensors.mean import Partition, reduced_weights
from sparkdeep.tensors.parameters import raw_bytes

__all__ = ["Ring"]


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
