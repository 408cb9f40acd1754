"""Where the replicas of a stage tell each other how they can be reached: on the driver, through their own connections."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, final

import torch.distributed as dist

from sparkdeep.errors import ProtocolError, ReplicaLostError
from sparkdeep.protocol.messages import field
from sparkdeep.stages.line import Line

__all__ = ["Meeting", "Trial", "available", "choose", "needs_trial", "ring_s", "star_s"]

_MOST_KEYS: Final = 1 << 16
_LONGEST_VALUE: Final = 1 << 16
_LONGEST_KEY: Final = 1 << 10
_MOST_BYTES: Final = 1 << 26


@final
class Meeting:
    """Keys and values of one stage; nothing listens for it but the coordinator, which has checked the token.

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

    def host(self, line: Line, size: int) -> None:
        """Have a replica join the ring; returns when its connections to all others stand.

        Raises:
            ReplicaLostError: it could not reach them in time.
        """
        line.waiting = False
        line.connection.send("ring", {"size": size, "timeout_s": self._timeout_s})
        while True:
            frame = line.expect("put", "get", "formed", timeout_s=self._timeout_s)
            if frame.kind == "formed":
                line.waiting = True
                return
            key = field(frame.header, "key", str)
            if frame.kind == "put":
                self._put(key, field(frame.header, "value", str))
            else:
                line.connection.send("value", {"value": self._get(key, line.who)})

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


def available() -> bool:
    """Whether this build of torch can do it."""
    return dist.is_available() and dist.is_gloo_available()


# What is small is over before it matters who adds it up, and a ring must be clearly better, as it is one more thing to fail.
_SMALLEST_BYTES: Final = 1 << 16
_CLEARLY: Final = 0.9


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
