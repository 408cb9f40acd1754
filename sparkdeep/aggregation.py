"""Where updates are added up, the star or the ring: chosen once a run, by a trial of both when the first stage opens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, final

__all__ = ["TRIAL_BYTES", "Trial", "choose", "needs_trial", "ring_s", "star_s"]

TRIAL_BYTES: Final = 4 << 20
"""What each replica exchanges in a trial, at most."""

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
