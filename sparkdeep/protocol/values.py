"""What a round starts from and what it gives, as the main loop and every transport see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sparkdeep.protocol.messages import Saved, Update
from sparkdeep.protocol.plans import RoundSpec

__all__ = ["Globals", "RoundResult", "RoundWork", "Traffic", "mean_loss"]


@dataclass(frozen=True, kw_only=True)
class Globals:
    """What every replica starts a round from."""

    parameters: Tensor
    """(numel,) in the layout's dtype; with a lossy `down_codec`, what replicas know of the global parameters."""
    buffers: dict[str, Tensor]
    sections: list[str]
    """Names of averaged optimizer state, with `inner_state="average"`."""
    inner: Tensor
    """(len(sections) * numel,)."""
    encoded: bytes | None = None
    """With a lossy `down_codec`: what leads to `parameters` from what replicas knew a round ago."""
    previous: Tensor | None = None
    """With `overlap`: the parameters of a round ago, (numel,), which a replica that is new to the stage needs."""
    base: Tensor | None = None
    """Where updates are differences: (numel,), what their mean is added to; else None."""


@dataclass(frozen=True, kw_only=True)
class RoundWork:
    """What replicas do in a round, and how long it may take."""

    specs: Sequence[RoundSpec]
    """One a replica, all of the same round."""
    clocks: Sequence[int]
    """Steps of every replica's learning-rate schedule before it."""
    rows: Sequence[int]
    """Training rows of every replica's shard."""
    deadline_s: float | None = None
    """For the whole round; None: only silence is a failure."""

    @property
    def round(self) -> int:
        """Its number, from 1."""
        return self.specs[0].round


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of one round at the driver, frames included."""

    sent_bytes: int = 0
    received_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """The mean of one round."""

    mean: Tensor
    """(numel,): float64 for an outer optimizer, in the layout's dtype for plain averaging; the next round overwrites it."""
    buffers: dict[str, Tensor]
    sections: list[str]
    inner: Tensor
    """(len(sections) * numel,): mean of the optimizer states, likewise."""
    loss: float
    updates: list[Update]
    hosts: Sequence[str] = ()
    """By replica."""
    reset: Sequence[int] = ()
    """Replicas that began the round with a fresh optimizer, as their state was lost."""
    saved: list[Saved]
    seconds: float
    traffic: Traffic = field(default_factory=Traffic)
    dropped: Mapping[int, str] = field(default_factory=dict)
    """Replicas that the round does not count, and why: "late", "nonfinite" or "rolled back"."""
    passed_over: Mapping[int, int] = field(default_factory=dict)
    """Steps that they had taken, as far as they said."""
    rolled_back: bool = False
    """Whether nobody counts, and all replicas are where they were before the round."""
    arrivals: list[list[int]] = field(default_factory=list)
    """With `asynchronous`: [replica, staleness] in the order in which replicas came in."""


def mean_loss(updates: Sequence[Update]) -> float:
    """Of all steps of a round, by their weights; NaN where nobody counts."""
    weight = sum(update.weight for update in updates)
    return sum(update.loss_sum for update in updates) / weight if weight else float("nan")
