"""Where updates are added up, the star or the ring: chosen once a run, by what both would take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, final

__all__ = ["PROBE_BYTES", "Bandwidth", "choose", "needs_measuring", "ring_s", "star_s"]

PROBE_BYTES: Final = 8 << 20
"""What each replica is sent to measure the bandwidth."""

# Below these the answer does not depend on the bandwidth: with two replicas a ring moves as much as a star and waits more
# often, and what is small is over before a ring has met.
_FEWEST_REPLICAS: Final = 3
_SMALLEST_BYTES: Final = 1 << 20
# A collective reaches this share of a line's bandwidth, and a ring must be better by more than the model is wrong.
_EFFICIENCY: Final = 0.7
_CLEARLY: Final = 0.8


@final
@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """What the driver measured when the first stage opened, in bytes a second."""

    all: float
    """From the driver to all replicas at the same time, together."""
    one: float
    """From the driver to one replica."""
    hosts: int
    """Distinct hosts that replicas run on."""


def star_s(num_replicas: int, num_bytes: int, bandwidth: Bandwidth) -> float:
    """Seconds of a round's exchange when every replica exchanges all parameters with the driver."""
    return 2 * num_replicas * num_bytes / bandwidth.all


def ring_s(num_replicas: int, num_bytes: int, bandwidth: Bandwidth) -> float:
    """Seconds when replicas exchange parts among themselves, and each its own part with the driver."""
    driver_s = 2 * num_bytes / bandwidth.all
    each = 2 * num_bytes * (num_replicas - 1) / num_replicas
    if bandwidth.hosts == 1:  # all of it passes through the one machine that was measured
        return driver_s + each * num_replicas / bandwidth.all
    per_host = num_replicas / bandwidth.hosts
    return driver_s + each * per_host / (_EFFICIENCY * bandwidth.one)


def needs_measuring(num_replicas: int, num_bytes: int) -> bool:
    """Whether the choice depends on the bandwidth."""
    return num_replicas >= _FEWEST_REPLICAS and num_bytes >= _SMALLEST_BYTES


def choose(num_replicas: int, num_bytes: int, bandwidth: Bandwidth) -> Literal["star", "ring"]:
    """The faster way for `num_bytes` of parameters, the star where they are close."""
    ring = ring_s(num_replicas, num_bytes, bandwidth)
    return "ring" if ring < _CLEARLY * star_s(num_replicas, num_bytes, bandwidth) else "star"
