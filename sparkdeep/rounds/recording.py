"""A round's record, from what its replicas report and what the driver knows; its decisions, taken again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from sparkdeep.errors import ConfigError
from sparkdeep.protocol.messages import RoundSpec, Update
from sparkdeep.protocol.orders import RoundResult
from sparkdeep.tracking.records import EvaluationRecord, FailureRecord, ReplicaRecord, RoundRecord

__all__ = ["Told", "record_of", "replayed"]


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the record has and the round's result has not."""

    opening_s: float
    """Seconds that opening the stage took, if this is its first round."""
    failures: list[FailureRecord]
    """Attempts that failed before."""
    aggregation: str
    changed: str
    """Such as "3 -> 2" where the number of replicas changed before it."""
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    """The evaluations of a gradient round."""


def record_of(specs: Sequence[RoundSpec], result: RoundResult, *, seconds: float, told: Told) -> RoundRecord:
    """The record of a round that was just committed.

    Args:
        specs: by replica.
        result: of the round.
        seconds: of the round and its outer step.
        told: what else is in the record.
    """
    compute_s = max(update.compute_s for update in result.updates)
    return RoundRecord(
        round=specs[0].round,
        epoch=max(spec.epoch for spec in specs) + 1,
        rows=sum(update.rows for update in result.updates),
        loss=result.loss,
        logged=_logged(result.updates),
        seconds=seconds + told.opening_s,
        compute_seconds=compute_s,
        exchange_seconds=max(0.0, result.seconds - compute_s),
        outer_seconds=max(0.0, seconds - result.seconds),
        stage_seconds=told.opening_s,
        state_seconds=max(saved.seconds for saved in result.saved),
        state_bytes=sum(saved.bytes for saved in result.saved),
        retries=len(told.failures),
        failures=told.failures,
        slowest=max(range(len(specs)), key=lambda i: result.updates[i].compute_s),
        sent_bytes=result.traffic.sent_bytes,
        received_bytes=result.traffic.received_bytes,
        aggregation=told.aggregation,
        state_reset=list(result.reset),
        num_workers_changed=told.changed,
        evaluations=told.evaluations,
        arrivals=result.arrivals,
        replicas=[
            ReplicaRecord(
                replica=i,
                host=result.hosts[i],
                rows=update.rows,
                weight=update.weight,
                steps=update.steps,
                compute_seconds=update.compute_s,
                input_seconds=update.input_s,
                dropped=spec.skip or result.dropped.get(i, ""),
                skipped_steps=_skipped(spec, result, i),
            )
            for i, (spec, update) in enumerate(zip(specs, result.updates, strict=True))
        ],
    )


def _skipped(spec: RoundSpec, result: RoundResult, replica: int) -> int:
    """Steps of its rows that a replica's clock skips."""
    if spec.skip == "idle" and spec.own_clock:
        return 0  # its clock stands still in the meantime
    if spec.skip or (replica in result.dropped and not spec.own_clock):
        return spec.num_steps
    return result.passed_over.get(replica, 0)


def _logged(updates: Sequence[Update]) -> dict[str, float]:
    """Means over the rows of those replicas that logged a name."""
    means: dict[str, float] = {}
    for name in [name for update in updates for name in update.logged]:
        parts = [(update.logged[name], update.rows) for update in updates if name in update.logged]
        means[name] = sum(value * rows for value, rows in parts) / sum(rows for _, rows in parts)
    return means


def replayed(specs: Sequence[RoundSpec], record: RoundRecord | None) -> tuple[RoundSpec, ...]:
    """The round's specs with the decisions of its record: what a clock, a quorum or NaN decided then is prescribed now.

    Args:
        specs: by replica.
        record: of the same round in the run that is replayed; None: nothing is decided yet.

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
