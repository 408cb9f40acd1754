"""How much local work each round does: rounds divide an epoch and never cross its end, or last a number of seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from sparkdeep.local_work import Clock, WarmStart

__all__ = ["OwnClocks", "Position", "RoundSpec", "Schedule", "TimeSchedule", "stretches"]


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run is: a pure function of the committed rounds."""

    round: int
    """Committed rounds."""
    epoch: int
    """Epoch of the next round, from 0."""
    step: int
    """First local step of the next round within its epoch, from 0."""


_START: Final = Position(round=0, epoch=0, step=0)


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
    budget_s: float | None = None
    """Stop after the step in which so many seconds are over; None: after `num_steps`."""
    own_clock: bool = False
    """Whether `epoch`, `first_step` and `num_steps` count this replica's own steps, and may cross an epoch's end."""
    period: int = 0
    """Local steps of an epoch on the common clock, where a round may cross its end; else 0."""
    gradient: Literal["", "batches", "all"] = ""
    """Nothing is trained, and the gradient told: of the next `num_steps` steps' batches, or of all rows; "": training."""
    skip: str = ""
    """Why the replica does nothing but advance the clock: "idle", or why the round was recorded as going on without it."""


def stretches(spec: RoundSpec, own: int) -> Iterator[tuple[int, int, int]]:
    """A round's steps of a replica with `own` steps an epoch, as (epoch, first, last), each within one epoch."""
    at, left = spec.first_step, spec.num_steps
    if not spec.own_clock:
        period = spec.period or at + left
        for epoch in range(spec.epoch, spec.epoch + 1 + (at + left - 1) // period):
            last = min(at + left, period)
            yield epoch, min(at, own), min(last, own)
            at, left = 0, left - (last - at)
        return
    at, end = spec.epoch * own + at, spec.epoch * own + at + left
    while at < end:
        epoch, first = divmod(at, own)
        last = min(own, first + end - at)
        yield epoch, first, last
        at += last - first


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A fixed number of local steps a round (`sync_every`), or one round an epoch."""

    steps_per_epoch: int
    """Local steps of the replica with the most rows: the common clock."""
    epochs: int
    """Passes over the data."""
    sync_every: int | Literal["epoch"]
    """Local steps between averages."""
    start: Position = _START
    """Where it begins: a run whose rows were dealt anew goes on in the middle of an epoch."""

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
    def _first_epoch_rounds(self) -> int:
        """Rounds of the epoch in which it begins."""
        return -(-(self.steps_per_epoch - self.start.step) // self.stride)

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run, those before `start` included."""
        later = self.epochs - self.start.epoch - 1
        return self.start.round + self._first_epoch_rounds + later * self.rounds_per_epoch

    def position(self, committed: int) -> Position:
        """Where the run is after `committed` rounds."""
        done = committed - self.start.round
        if done < self._first_epoch_rounds:
            return Position(round=committed, epoch=self.start.epoch, step=self.start.step + done * self.stride)
        epoch, nth = divmod(done - self._first_epoch_rounds, self.rounds_per_epoch)
        return Position(round=committed, epoch=self.start.epoch + 1 + epoch, step=nth * self.stride)

    def next(self, committed: int) -> RoundSpec | None:
        """The round after `committed` rounds, or None when the run is over."""
        if committed >= self.num_rounds:
            return None
        at = self.position(committed)
        left = self.steps_per_epoch - at.step
        return RoundSpec(round=committed + 1, epoch=at.epoch, first_step=at.step, num_steps=min(self.stride, left))

    def specs(self, committed: int, consumed: Sequence[int], clock: Clock) -> tuple[RoundSpec, ...] | None:
        """The next round of every replica; on the common clock they are alike."""
        del clock
        spec = self.next(committed)
        return None if spec is None else (spec,) * len(consumed)

    def advanced(self, consumed: Sequence[int], specs: Sequence[RoundSpec], taken: Sequence[int]) -> list[int]:
        """Unchanged: where a run is follows from its committed rounds."""
        del specs, taken
        return list(consumed)

    def epochs_done(self, committed: int, consumed: Sequence[int]) -> int:
        """Epochs that are over."""
        del consumed
        return self.position(committed).epoch

    def share_of_epoch(self, committed: int, consumed: Sequence[int]) -> float:
        """How much of the current epoch is over, from 0 to below 1."""
        del consumed
        return self.position(committed).step / self.steps_per_epoch

    def clock(self, committed: int, consumed: Sequence[int], replica: int) -> int:
        """Steps of a replica's learning-rate schedule so far."""
        del consumed, replica
        at = self.position(committed)
        return at.epoch * self.steps_per_epoch + at.step


@dataclass(frozen=True, kw_only=True)
class OwnClocks:
    """What schedules have in common in which each replica has a clock of its own."""

    steps: tuple[int, ...]
    """Local steps an epoch, by replica."""
    epochs: int
    """Passes of each replica over its rows."""

    num_rounds: None = None
    """Nobody knows before."""

    def next(self, committed: int) -> RoundSpec | None:
        """Not known before the round is due."""
        del committed
        return None

    def advanced(self, consumed: Sequence[int], specs: Sequence[RoundSpec], taken: Sequence[int]) -> list[int]:
        """What each replica has consumed after a round in which it has taken so many steps."""
        del specs
        return [done + own for done, own in zip(consumed, taken, strict=True)]

    def epochs_done(self, committed: int, consumed: Sequence[int]) -> int:
        """Whole epochs in what all replicas have consumed together."""
        del committed
        return sum(consumed) // max(1, sum(self.steps))

    def share_of_epoch(self, committed: int, consumed: Sequence[int]) -> float:
        """How much of the current epoch is over, from 0 to below 1, all replicas together."""
        del committed
        whole = max(1, sum(self.steps))
        return sum(consumed) % whole / whole

    def clock(self, committed: int, consumed: Sequence[int], replica: int) -> int:
        """Steps of a replica's learning-rate schedule so far: its own."""
        del committed
        return consumed[replica]


@dataclass(frozen=True, kw_only=True)
class TimeSchedule(OwnClocks):
    """Rounds of a number of seconds: each replica takes the steps that it gets done, on a clock of its own.

    The run is over when every replica has been through its own rows `epochs` times; one that is there first waits with
    weight 0. What a replica has consumed is counted by the driver, in own steps since the run began.
    """

    budget_s: float
    """Seconds of local work a round."""
    warm: WarmStart | None = None
    """Has all but the first replica idle for its first steps."""

    def specs(self, committed: int, consumed: Sequence[int], clock: Clock) -> tuple[RoundSpec, ...] | None:
        """The next round of every replica, or None when all have been through their rows."""
        left = [self.epochs * own - done for own, done in zip(self.steps, consumed, strict=True)]
        if max(left) <= 0:
            return None
        idle = [self.warm is not None and left[0] > 0 and self.warm.idle(clock, i) for i in range(len(left))]
        if self.warm is not None and any(idle):
            left[0] = min(left[0], self.warm.num_steps - clock.step)
        return tuple(
            RoundSpec(
                round=committed + 1,
                epoch=min(done // own, self.epochs - 1) if own else 0,
                first_step=done % own if own else 0,
                num_steps=max(0, rest),
                budget_s=self.budget_s,
                own_clock=True,
                skip="idle" if waits else "",
            )
            for own, done, rest, waits in zip(self.steps, consumed, left, idle, strict=True)
        )
