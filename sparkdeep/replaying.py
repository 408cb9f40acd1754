"""Taking recorded decisions again: who was counted in a round, and how many steps each replica took."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sparkdeep.errors import ConfigError
from sparkdeep.metrics import RoundRecord
from sparkdeep.schedule import RoundSpec

__all__ = ["replayed"]


def replayed(specs: Sequence[RoundSpec], record: RoundRecord | None) -> tuple[RoundSpec, ...]:
    """The round's specs with the decisions of its record: what a clock, a quorum or NaN decided then is an order now.

    Args:
        specs: by replica.
        record: of the same round of the run that is repeated; None: nothing is decided yet.

    Raises:
        ConfigError: the record is of another number of replicas.
    """
    if record is None:
        return tuple(specs)
    if len(record.replicas) != len(specs):
        raise ConfigError(
            f"round {record.round} was recorded with {len(record.replicas)} replicas, and is repeated with {len(specs)}: repeat "
            "a run with the number of workers that it had."
        )
    return tuple(
        dataclasses.replace(
            spec,
            budget_s=None,
            num_steps=part.steps + part.skipped_steps if spec.own_clock else spec.num_steps,
            skip=part.dropped,
        )
        for spec, part in zip(specs, record.replicas, strict=True)
    )
