"""How much local work each round does: rounds divide an epoch and never cross its end, or last a number of seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

from sparkdeep.optim.local_work import Clock, DyLU, LocalWork, WarmStart
from sparkdeep.protocol.messages import Position, RoundSpec

__all__ = ["Counted", "PacedSchedule", "RuledSchedule", "Schedule", "TimeSchedule", "stretches"]


_START: Final = Position(round=0, epoch=0, step=0)


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
class Counted:
    """What schedules have in common whose steps the driver counts: here each replica has a clock of its own."""

    steps: tuple[int, ...]
    """Local steps an epoch, by replica."""
    epochs: int
    """Passes over the data."""

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

    def _progress(self, consumed: Sequence[int]) -> tuple[int, int]:
        """Steps so far, and those of an epoch: all replicas' together."""
        return sum(consumed), max(1, sum(self.steps))

    def epochs_done(self, committed: int, consumed: Sequence[int]) -> int:
        """Epochs that are over."""
        del committed
        done, epoch = self._progress(consumed)
        return done // epoch

    def share_of_epoch(self, committed: int, consumed: Sequence[int]) -> float:
        """How much of the current epoch is over, from 0 to below 1."""
        del committed
        done, epoch = self._progress(consumed)
        return done % epoch / epoch

    def clock(self, committed: int, consumed: Sequence[int], replica: int) -> int:
        """Steps of a replica's learning-rate schedule so far."""
        del committed
        return consumed[replica]


@dataclass(frozen=True, kw_only=True)
class TimeSchedule(Counted):
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


@final
@dataclass(frozen=True, kw_only=True)
class RuledSchedule(Counted):
    """Rounds on the common clock, which is that of the replica with the most rows, as long as a rule says."""

    rule: LocalWork

    def specs(self, committed: int, consumed: Sequence[int], clock: Clock) -> tuple[RoundSpec, ...] | None:
        """The next round, by replica: alike, but for those that are idle."""
        at, period = self._progress(consumed)
        left = self.epochs * period - at
        if left <= 0:
            return None
        epoch, first = divmod(at, period)
        most = left if self.rule.crosses else period - first
        num_steps = max(1, min(self.rule.steps(clock), most))
        return tuple(
            RoundSpec(
                round=committed + 1,
                epoch=epoch,
                first_step=first,
                num_steps=num_steps,
                period=period if self.rule.crosses else 0,
                skip="idle" if self.rule.idle(clock, replica) else "",
            )
            for replica in range(len(consumed))
        )

    def advanced(self, consumed: Sequence[int], specs: Sequence[RoundSpec], taken: Sequence[int]) -> list[int]:
        """The clock after a round: every replica's is the common one."""
        del taken
        return [done + spec.num_steps for done, spec in zip(consumed, specs, strict=True)]

    def _progress(self, consumed: Sequence[int]) -> tuple[int, int]:
        return max(consumed), max(self.steps)


@final
@dataclass(frozen=True, kw_only=True)
class PacedSchedule(Counted):
    """Rounds in which each replica has a number of steps in proportion to its speed, on a clock of its own (`DyLU`).

    The run is over when every replica has been through its own rows `epochs` times; one that is there first waits with
    weight 0.
    """

    rule: DyLU

    def specs(self, committed: int, consumed: Sequence[int], clock: Clock) -> tuple[RoundSpec, ...] | None:
        """The next round of every replica, or None when all have been through their rows."""
        left = [self.epochs * own - done for own, done in zip(self.steps, consumed, strict=True)]
        if max(left) <= 0:
            return None
        paces = self.rule.shares(clock, left)
        return tuple(
            RoundSpec(
                round=committed + 1,
                epoch=min(done // own, self.epochs - 1) if own else 0,
                first_step=done % own if own else 0,
                num_steps=max(0, min(pace, rest)),
                own_clock=True,
            )
            for own, done, rest, pace in zip(self.steps, consumed, left, paces, strict=True)
        )
