"""A generation of replicas: how the rows were dealt to them, and the rounds that they train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from sparkdeep.checks import misfit
from sparkdeep.data.order import steps_per_epoch
from sparkdeep.errors import CheckpointError, ConfigError
from sparkdeep.optim.local_work import DyLU, WarmStart
from sparkdeep.optim.schedule import PacedSchedule, RuledSchedule, Schedule, TimeSchedule
from sparkdeep.protocol.messages import Position, ShardFacts
from sparkdeep.settings.run import LocalSettings, RunSettings

__all__ = ["AnySchedule", "Generation"]

AnySchedule: TypeAlias = Schedule | TimeSchedule | RuledSchedule | PacedSchedule


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The replicas of a part of a run."""

    shards: tuple[ShardFacts, ...]
    """One a replica."""
    schedule: AnySchedule
    began: int = 0
    """Committed rounds when the rows were dealt."""
    consumed: tuple[int, ...] = ()
    """Own steps of each replica when the rows were dealt: 0, or its part of an epoch that was under way."""
    steps: tuple[int, ...] = ()
    """Local steps an epoch, by replica."""

    @classmethod
    def over(
        cls,
        shards: Sequence[ShardFacts],
        local: LocalSettings,
        settings: RunSettings,
        start: Position | None = None,
        share: float = 0.0,
    ) -> Generation:
        """Deal a run, or the rest of it.

        Args:
            shards: one per replica.
            local: settings of the fit, as its replicas know them.
            settings: as the driver knows them.
            start: round and epoch with which it begins; None: those of a new run.
            share: of that epoch which is over, from 0 to below 1: so much of each shard counts as seen.

        Raises:
            ConfigError: there is no training row.
        """
        start = start or Position(round=0, epoch=0, step=0)
        steps = tuple(
            steps_per_epoch(
                shard.rows["train"], batch_size=local.batch_size, accumulate_batches=local.accumulate_batches
            )
            for shard in shards
        )
        if max(steps) == 0:
            raise ConfigError("no training rows are left: every row went to validation. Lower validation=.")
        seen = [min(own - 1, round(share * own)) if own else 0 for own in steps]
        schedule: AnySchedule
        if isinstance(settings.schedule, DyLU):
            schedule = PacedSchedule(steps=steps, epochs=settings.epochs, rule=settings.schedule)
        elif settings.time_budget_s is not None:
            warm = settings.schedule if isinstance(settings.schedule, WarmStart) else None
            schedule = TimeSchedule(steps=steps, epochs=settings.epochs, budget_s=settings.time_budget_s, warm=warm)
        elif settings.schedule is not None:
            schedule = RuledSchedule(steps=steps, epochs=settings.epochs, rule=settings.schedule)
            common = start.epoch * max(steps) + max(seen)
            return cls(
                shards=tuple(shards), schedule=schedule, began=start.round, consumed=(common,) * len(steps), steps=steps
            )
        else:
            schedule = Schedule(
                steps_per_epoch=max(steps),
                epochs=settings.epochs,
                sync_every=settings.sync_every,
                start=Position(round=start.round, epoch=start.epoch, step=max(seen)),
            )
        consumed = tuple(start.epoch * own + done for own, done in zip(steps, seen, strict=True))
        return cls(shards=tuple(shards), schedule=schedule, began=start.round, consumed=consumed, steps=steps)

    @property
    def num_replicas(self) -> int:
        """One a shard."""
        return len(self.shards)

    def to_json(self) -> dict[str, Any]:
        """JSON values from which `from_json` makes an equal generation."""
        at = self.schedule.start if isinstance(self.schedule, Schedule) else None
        return {
            "shards": [asdict(shard) for shard in self.shards],
            "start": asdict(at) if at is not None else None,
            "began": self.began,
            "consumed": list(self.consumed),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], local: LocalSettings, settings: RunSettings) -> Generation:
        """Make the generation that `to_json` described; `epochs` may have grown since.

        Raises:
            CheckpointError: it is damaged.
        """
        if complaint := misfit(_Stored, value):
            raise CheckpointError(f"a checkpoint is damaged: {complaint}")
        shards = [ShardFacts(**one) for one in value["shards"]]
        if not shards or min(_counts(shards)) < 0 or len(value["consumed"]) != len(shards):
            raise CheckpointError("a checkpoint is damaged: its shards and their rows cannot be.")
        try:
            fresh = cls.over(shards, local, settings)
        except ConfigError as error:
            raise CheckpointError(f"a checkpoint is damaged: {error}") from error
        schedule = fresh.schedule
        if isinstance(schedule, Schedule) and value["start"] is not None:
            start = Position(**value["start"])
            if min(start.round, start.epoch) < 0 or not 0 <= start.step < schedule.steps_per_epoch:
                raise CheckpointError(f"a checkpoint is damaged: replicas that began at {start}.")
            schedule = replace(schedule, start=start)
        return cls(
            shards=fresh.shards,
            schedule=schedule,
            began=value["began"],
            consumed=tuple(value["consumed"]),
            steps=fresh.steps,
        )


def _counts(shards: Sequence[ShardFacts]) -> list[int]:
    return [shard.rows.get(split, -1) for shard in shards for split in ("train", "validation")]


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The form of what `Generation.to_json` returns."""

    shards: list[ShardFacts]
    start: Position | None
    began: int
    consumed: list[int]
