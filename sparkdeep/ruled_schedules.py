"""Schedules that a rule makes as the run goes: on the common clock, or with a number of steps for each replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from sparkdeep.local_work import Clock, DyLU, LocalWork
from sparkdeep.schedule import OwnClocks, RoundSpec

__all__ = ["PacedSchedule", "RuledSchedule"]


@final
@dataclass(frozen=True, kw_only=True)
class RuledSchedule:
    """Rounds on the common clock, as long as a rule says; the driver counts the steps, as nobody knows them before."""

    steps_per_epoch: int
    """Local steps of the replica with the most rows: the common clock."""
    epochs: int
    """Passes over the data."""
    rule: LocalWork

    num_rounds: None = None
    """Nobody knows before."""

    def specs(self, committed: int, consumed: Sequence[int], clock: Clock) -> tuple[RoundSpec, ...] | None:
        """The next round, by replica: alike, but for those that are idle."""
        at = max(consumed)
        left = self.epochs * self.steps_per_epoch - at
        if left <= 0:
            return None
        epoch, first = divmod(at, self.steps_per_epoch)
        most = left if self.rule.crosses else self.steps_per_epoch - first
        num_steps = max(1, min(self.rule.steps(clock), most))
        return tuple(
            RoundSpec(
                round=committed + 1,
                epoch=epoch,
                first_step=first,
                num_steps=num_steps,
                period=self.steps_per_epoch if self.rule.crosses else 0,
                skip="idle" if self.rule.idle(clock, replica) else "",
            )
            for replica in range(len(consumed))
        )

    def next(self, committed: int) -> RoundSpec | None:
        """Not known before the round is due."""
        del committed
        return None

    def advanced(self, consumed: Sequence[int], specs: Sequence[RoundSpec], taken: Sequence[int]) -> list[int]:
        """The clock after a round: every replica's is the common one."""
        del taken
        return [done + spec.num_steps for done, spec in zip(consumed, specs, strict=True)]

    def epochs_done(self, committed: int, consumed: Sequence[int]) -> int:
        """Epochs that are over."""
        del committed
        return max(consumed) // self.steps_per_epoch

    def share_of_epoch(self, committed: int, consumed: Sequence[int]) -> float:
        """How much of the current epoch is over, from 0 to below 1."""
        del committed
        return max(consumed) % self.steps_per_epoch / self.steps_per_epoch

    def clock(self, committed: int, consumed: Sequence[int], replica: int) -> int:
        """Steps of a replica's learning-rate schedule so far: common ones."""
        del committed
        return consumed[replica]


@final
@dataclass(frozen=True, kw_only=True)
class PacedSchedule(OwnClocks):
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
