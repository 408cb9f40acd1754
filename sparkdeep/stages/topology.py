"""Star or ring: what the driver measures when the first stage opens, and which of them it chooses."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, final

import torch.distributed as dist

from sparkdeep.errors import ProtocolError
from sparkdeep.protocol.messages import TRIAL_BYTES
from sparkdeep.stages.driver_link import DriverLink

__all__ = ["Trial", "available", "choose", "measure", "needs_trial", "ring_s", "star_s"]


def available() -> bool:
    """Whether this build of torch can do it."""
    return dist.is_available() and dist.is_gloo_available()


# Small vectors take so little time that it hardly matters who adds them up; and a ring must be clearly better, as it is one
# more thing that can fail.
_SMALLEST_BYTES: Final = 1 << 16
_CLEARLY: Final = 0.9
_TRIALS: Final = 5


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
