"""How much local work each round does: rounds divide an epoch, and never cross its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Position", "RoundSpec", "Schedule"]


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run is: a pure function of the committed rounds."""

    round: int
    """Committed rounds."""
    epoch: int
    """Epoch of the next round, from 0."""
    step: int
    """First local step of the next round within its epoch, from 0."""


@dataclass(frozen=True, kw_only=True)
class RoundSpec:
    """The local work of one round, the same for every replica; one with fewer batches does what it has."""

    round: int
    """The round's number, from 1."""
    epoch: int
    """Which pass over the data, from 0."""
    first_step: int
    """First local step within the epoch."""
    num_steps: int
    """Local steps on the common clock; learning-rate schedules advance by this much on every replica."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A fixed number of local steps a round (`sync_every`), or one round an epoch."""

    steps_per_epoch: int
    """Local steps of the replica with the most rows: the common clock."""
    epochs: int
    """Passes over the data."""
    sync_every: int | Literal["epoch"]
    """Local steps between averages."""

    @classmethod
    def over(cls, steps: Sequence[int], *, epochs: int, sync_every: int | Literal["epoch"]) -> Schedule:
        """The schedule for replicas with `steps[i]` local steps an epoch each."""
        return cls(steps_per_epoch=max(steps), epochs=epochs, sync_every=sync_every)

    @property
    def stride(self) -> int:
        """Local steps of a full round."""
        return self.steps_per_epoch if self.sync_every == "epoch" else self.sync_every

    @property
    def rounds_per_epoch(self) -> int:
        """Rounds in one epoch; the last may be short."""
        return -(-self.steps_per_epoch // self.stride)

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run."""
        return self.epochs * self.rounds_per_epoch

    def position(self, committed: int) -> Position:
        """Where the run is after `committed` rounds."""
        epoch, nth = divmod(committed, self.rounds_per_epoch)
        return Position(round=committed, epoch=epoch, step=nth * self.stride)

    def next(self, committed: int) -> RoundSpec | None:
        """The round after `committed` rounds, or None when the run is over."""
        if committed >= self.num_rounds:
            return None
        at = self.position(committed)
        left = self.steps_per_epoch - at.step
        return RoundSpec(round=committed + 1, epoch=at.epoch, first_step=at.step, num_steps=min(self.stride, left))

    def ends_epoch(self, spec: RoundSpec) -> bool:
        """Whether `spec` is the last round of its epoch."""
        return spec.first_step + spec.num_steps >= self.steps_per_epoch
