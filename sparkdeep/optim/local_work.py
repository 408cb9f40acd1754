"""Schedules of the local work: rules that say, from where a run is, how many local steps the next round has."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparkdeep.checks import at_least, positive
from sparkdeep.errors import ConfigError
from sparkdeep.tracking.records import RoundRecord

__all__ = ["QSR", "AdaComm", "Clock", "DyLU", "Epochs", "LocalWork", "PostLocal", "WarmStart"]


@dataclass(frozen=True, kw_only=True)
class Clock:
    """What a rule may look at. A pure function of these, it takes the same decisions when a run is repeated."""

    step: int
    """Local steps since the run began, on the common clock."""
    steps_per_epoch: int
    """Of the replica with the most rows."""
    sync_every: int
    """Local steps of a round where no rule says otherwise; an epoch's with "epoch"."""
    rate: Callable[[int], float]
    """The inner learning rate after so many local steps."""
    highest: Callable[[int], float]
    """The highest of the rates until then."""
    records: Sequence[RoundRecord] = ()
    """Of the committed rounds."""


class LocalWork(ABC):
    """A rule for the length of rounds; `steps` is asked once a round."""

    own_clock = False
    """Whether each replica has a number of steps of its own (`shares`)."""
    alike = True
    """Whether all replicas do the same in a round."""

    @abstractmethod
    def steps(self, clock: Clock) -> int:
        """Local steps of the next round, at least 1; a round ends with the epoch unless the rule `crosses` it."""

    @property
    def crosses(self) -> bool:
        """Whether a round goes on over the end of an epoch."""
        return False

    def idle(self, clock: Clock, replica: int) -> bool:
        """Whether a replica does nothing in the next round but keep time."""
        del clock, replica
        return False


@dataclass(frozen=True)
class Epochs(LocalWork):
    """A round is `count` passes over the data, as the E local epochs of FedAvg (McMahan et al., 2017)."""

    count: int = 1

    def __post_init__(self) -> None:
        at_least("Epochs.count", self.count, 1)

    def steps(self, clock: Clock) -> int:
        """All steps of `count` epochs."""
        return self.count * clock.steps_per_epoch

    @property
    def crosses(self) -> bool:
        """A round of several epochs does."""
        return self.count > 1


@dataclass(frozen=True)
class PostLocal(LocalWork):
    """Dense first, then local: every step is averaged until `switch_step`, then every `sync_every` ones.

    Lin et al. (2020, "Don't use large mini-batches, use local SGD"), who switch at the first drop of the learning rate: that is
    what None means. A rate that comes back to its highest, as with warm restarts, is dense again.
    """

    switch_step: int | None = None
    """Local steps after which rounds are long; None: those after which the inner rate falls below its highest so far."""

    def __post_init__(self) -> None:
        if self.switch_step is not None:
            at_least("PostLocal.switch_step", self.switch_step, 0)

    def steps(self, clock: Clock) -> int:
        """1, or `sync_every`."""
        if self.switch_step is not None:
            return 1 if clock.step < self.switch_step else clock.sync_every
        return 1 if clock.rate(clock.step) >= clock.highest(clock.step) else clock.sync_every


@dataclass(frozen=True)
class QSR(LocalWork):
    """The quadratic synchronization rule: `max(sync_every, floor((alpha / rate)^2))` (Gu et al., 2024).

    While the rate rises, as in its warm-up, `sync_every`: it is low there, and nothing is settled yet.
    """

    alpha: float

    def __post_init__(self) -> None:
        positive("QSR.alpha", self.alpha)

    def steps(self, clock: Clock) -> int:
        """More as the rate falls; at a rate of 0, an epoch."""
        rate = clock.rate(clock.step)
        if clock.rate(clock.step + 1) > rate:
            return clock.sync_every
        quadratic = (self.alpha / rate) ** 2 if rate > 0 else math.inf
        return max(clock.sync_every, math.floor(min(quadratic, float(clock.steps_per_epoch))))


@dataclass(frozen=True)
class AdaComm(LocalWork):
    """Adaptive communication: `ceil(sync_every * sqrt(rate_0 / rate * loss / loss_0))` (Wang and Joshi, 2019).

    `loss_0` is that of the first `every` rounds, `loss` that of the newest `every` whole ones, `rate_0` the highest rate so far:
    that of the start, or of the end of a warm-up. Rounds without a finite loss do not count.
    """

    every: int = 10
    """Rounds for which a number of steps stays."""

    def __post_init__(self) -> None:
        at_least("AdaComm.every", self.every, 1)

    def steps(self, clock: Clock) -> int:
        """At least 1, and at most an epoch's."""
        blocks = len(clock.records) // self.every
        if blocks == 0:
            return clock.sync_every
        losses = [self._loss(clock.records[i * self.every : (i + 1) * self.every]) for i in (0, blocks - 1)]
        at = sum(
            max(part.steps + part.skipped_steps for part in r.replicas) for r in clock.records[: blocks * self.every]
        )
        first, now = clock.highest(at), clock.rate(at)
        if not losses[0] > 0 or not losses[1] >= 0 or not now > 0:
            return clock.sync_every
        wanted = math.ceil(clock.sync_every * math.sqrt(first / now * losses[1] / losses[0]))
        return max(1, min(wanted, clock.steps_per_epoch))

    @staticmethod
    def _loss(records: Sequence[RoundRecord]) -> float:
        losses = [record.loss for record in records if math.isfinite(record.loss)]
        return sum(losses) / len(losses) if losses else math.nan


@dataclass(frozen=True)
class WarmStart(LocalWork):
    """One replica first, then all (Dean et al., 2012): for `num_steps` local steps only the first replica trains.

    The others keep time: their rows of these steps come in the next epoch, so that a run must be longer than the warm start.
    """

    alike = False
    num_steps: int
    then: LocalWork | None = None
    """The rule afterwards; None: `sync_every`."""

    def __post_init__(self) -> None:
        at_least("WarmStart.num_steps", self.num_steps, 1)
        if self.then is not None and (not isinstance(self.then, LocalWork) or not self.then.alike):
            raise ConfigError(
                f"WarmStart.then={self.then!r}: must be a schedule that is the same for all replicas, such as PostLocal(), or None."
            )

    def steps(self, clock: Clock) -> int:
        """As the rule afterwards, but no round has both one replica and all."""
        usual = clock.sync_every if self.then is None else self.then.steps(clock)
        left = self.num_steps - clock.step
        return min(usual, left) if left > 0 else usual

    @property
    def crosses(self) -> bool:
        """As the rule afterwards."""
        return self.then is not None and self.then.crosses

    def idle(self, clock: Clock, replica: int) -> bool:
        """All but the first, in the beginning."""
        return clock.step < self.num_steps and replica > 0


@dataclass(frozen=True)
class DyLU(LocalWork):
    """Dynamic local updates: steps in proportion to each replica's speed, `sync_every` for the fastest (Liu et al., 2024).

    Each replica has a clock of its own, as with `time_budget_s`, and goes through its own rows `epochs` times.
    """

    own_clock = True
    alike = False
    rounds: int = 5
    """Newest rounds from which speeds are taken."""

    def __post_init__(self) -> None:
        at_least("DyLU.rounds", self.rounds, 1)

    def steps(self, clock: Clock) -> int:
        """Of the fastest replica."""
        return clock.sync_every

    def shares(self, clock: Clock, left: Sequence[int]) -> list[int]:
        """Local steps of every replica, at least 1; alike until one has done some.

        Args:
            clock: where the run is.
            left: steps that each replica has left; one that has none is no measure for the others. One that has been late in all
                the rounds that are looked at counts as half as fast as the slowest of the others.
        """
        done = [[0, 0.0] for _ in left]
        for record in clock.records[-self.rounds :]:
            if len(record.replicas) == len(left):
                for own, part in zip(done, record.replicas, strict=True):
                    own[0] += part.steps
                    own[1] += part.compute_seconds
        speeds = [steps / seconds if steps and seconds > 0 else 0.0 for steps, seconds in done]
        known = [speed for speed, rest in zip(speeds, left, strict=True) if speed > 0 and rest > 0]
        if not known:
            return [clock.sync_every] * len(left)
        return [max(1, round(clock.sync_every * min(1.0, (speed or min(known) / 2) / max(known)))) for speed in speeds]
