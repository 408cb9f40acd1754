"""The ring at the driver: whether it is faster than the star, where replicas meet to form it, and what collects its parts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal, final

import torch
import torch.distributed as dist
from torch import Tensor

from sparkdeep.errors import ProtocolError, ReplicaLostError
from sparkdeep.protocol.messages import TRIAL_BYTES, Update, field, parse
from sparkdeep.protocol.orders import Order
from sparkdeep.protocol.wire import Buffer
from sparkdeep.stages.admission import Admission
from sparkdeep.stages.collector import Round, Taken
from sparkdeep.stages.driver_link import DriverLink
from sparkdeep.tensors.mean import Partition, reduced_weights
from sparkdeep.tensors.parameters import raw_bytes

__all__ = ["Meeting", "Ring", "Trial", "available", "choose", "measure", "needs_trial", "ring_s", "star_s"]

# Small vectors take so little time that it hardly matters who adds them up; and a ring must be clearly better, as it is one
# more thing that can fail.
_SMALLEST_BYTES: Final = 1 << 16
_CLEARLY: Final = 0.9
_TRIALS: Final = 5
_MOST_KEYS: Final = 1 << 16
_LONGEST_VALUE: Final = 1 << 16
_LONGEST_KEY: Final = 1 << 10
_MOST_BYTES: Final = 1 << 26


def available() -> bool:
    """Whether this build of torch can do it."""
    return dist.is_available() and dist.is_gloo_available()


@final
@dataclass(frozen=True, kw_only=True)
class Trial:
    """What the driver measured when the first stage opened."""

    num_bytes: int
    """Bytes a replica exchanged, each way."""
    star_s: float
    """Seconds for all replicas to be sent so much by the driver and to send it back, at the same time."""
    ring_s: float
    """Seconds for them to add up and hand round so much among themselves."""


def measure(num_bytes: int, each: Callable[[Callable[[DriverLink], None]], object]) -> Trial:
    """Try the star and the ring, which must have been formed, with up to `num_bytes` a replica.

    Args:
        num_bytes: of the parameters.
        each: runs a function for every replica's link at the same time, and returns when all are done.
    """
    size = max(4, min(num_bytes, TRIAL_BYTES) // 4 * 4)
    load = bytes(size)

    def star(link: DriverLink) -> None:
        link.send("probe", None, load)
        frame = link.expect("probed")
        if frame.body_bytes != size:
            raise ProtocolError(f"{link.who} sent {frame.body_bytes} bytes back; {size} were sent to it.")
        replica = link.hello.replica
        link.read(memoryview(rooms.get(replica) or rooms.setdefault(replica, bytearray(size))))

    def ring(link: DriverLink) -> None:
        link.send("trial", {"numel": size // 4})
        link.expect("tried")

    rooms: dict[int, bytearray] = {}
    seconds: dict[str, float] = {}
    for name, work in (("star", star), ("ring", ring)):
        for _ in range(_TRIALS):  # the first finds buffers small and pages untouched
            began = time.perf_counter()
            each(work)
            took = time.perf_counter() - began
            seconds[name] = min(took, seconds.get(name, took))
    return Trial(num_bytes=size, star_s=seconds["star"], ring_s=seconds["ring"])


def needs_trial(num_replicas: int, num_bytes: int) -> bool:
    """Whether there is a choice."""
    return num_replicas >= 2 and num_bytes >= _SMALLEST_BYTES


def star_s(num_bytes: int, trial: Trial) -> float:
    """Seconds of a round's exchange when every replica exchanges `num_bytes` with the driver."""
    return trial.star_s * max(1.0, num_bytes / trial.num_bytes)


def ring_s(num_replicas: int, num_bytes: int, trial: Trial, *, outer: bool) -> float:
    """Seconds when replicas exchange parts among themselves.

    With plain averaging they hold the mean at once, and the driver is sent it beside; an outer optimizer moves it first, so
    that every part goes to the driver and back in between.
    """
    scale = max(1.0, num_bytes / trial.num_bytes)
    return scale * (trial.ring_s + (trial.star_s / num_replicas if outer else 0.0))


def choose(num_replicas: int, num_bytes: int, trial: Trial, *, outer: bool) -> Literal["star", "ring"]:
    """The faster way for `num_bytes` of parameters, the star where they are close."""
    ring = ring_s(num_replicas, num_bytes, trial, outer=outer)
    return "ring" if ring < _CLEARLY * star_s(num_bytes, trial) else "star"


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
