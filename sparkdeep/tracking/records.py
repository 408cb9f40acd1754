"""One record a round: what was learned, from how many rows, and where the time went."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sparkdeep.checks import misfit
from sparkdeep.errors import DataError

__all__ = [
    "PHASES",
    "EvaluationRecord",
    "FailureRecord",
    "ReplicaRecord",
    "RoundRecord",
    "numbers_of",
    "read_jsonl",
    "summary",
    "write_jsonl",
]


_MAY_BE_NONE: Final = frozenset({"slowest", "replica", "host"})


@dataclass(frozen=True, kw_only=True)
class ReplicaRecord:
    """One replica's part of a round."""

    replica: int
    host: str
    rows: int
    """Rows trained on."""
    weight: float
    """Its weight in the mean, before normalization: rows, or their summed weights."""
    steps: int
    """Local steps."""
    compute_seconds: float
    """Seconds of local work, waiting for batches included."""
    input_seconds: float
    """The part of it spent waiting for batches."""
    dropped: str = ""
    """Why the round does not count this replica: "late" (`quorum`), "nonfinite" or "rolled back" (`on_nonfinite`), "idle"
    (`WarmStart`); "" when it does."""
    skipped_steps: int = 0
    """Local steps of its rows that the run skips because of that."""


@dataclass(frozen=True, kw_only=True)
class FailureRecord:
    """An attempt that failed and was repeated."""

    error: str
    """The class of what was raised."""
    message: str
    """Its first line."""
    replica: int | None
    """Which replica, where that is known."""
    host: str | None
    """The host that it ran on."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """One loss and its gradient, as an outer optimizer asked for it (`work="gradient"`)."""

    loss: float
    gradient_norm: float
    """Norm of the whole gradient, before clipping."""
    seconds: float
    cached: bool = False
    """Whether it was known already, because the parameters are those of an earlier evaluation, to the last bit."""


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """The record of one committed round; fields can be read as attributes or as `record["loss"]`."""

    round: int
    """From 1."""
    epoch: int
    """From 1."""
    rows: int
    """Rows trained on by all replicas in this round."""
    loss: float
    """Training loss: the mean over the round's rows of the loss when each was seen; with L-BFGS, at the round's end."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Scores of the averaged model on the validation rows ("loss" and each metric); empty when not validated."""
    logged: dict[str, float] = field(default_factory=dict)
    """What the model logged itself in training (a Lightning module's `self.log`): means over the round's rows."""
    seconds: float = 0.0
    """Wall time of the round, stage opening and validation included."""
    compute_seconds: float = 0.0
    """Local work of the slowest replica."""
    exchange_seconds: float = 0.0
    """From sending parameters to holding the mean, less `compute_seconds`."""
    outer_seconds: float = 0.0
    """The outer step."""
    stage_seconds: float = 0.0
    """Opening the barrier stage, when this round was its first; else 0."""
    state_seconds: float = 0.0
    """Keeping replica states on the executors' disks, the slowest replica's; part of it overlaps the exchange."""
    state_bytes: int = 0
    """Bytes written for that, all replicas together."""
    validation_seconds: float = 0.0
    """Scoring the validation rows."""
    checkpoint_seconds: float = 0.0
    """Collecting replica states and writing the checkpoint or snapshot."""
    checkpoint_bytes: int = 0
    """Bytes moved for that."""
    checkpoint_error: str = ""
    """Why this round's checkpoint could not be written, with `on_checkpoint_error="warn"`; else ""."""
    sent_bytes: int = 0
    """Bytes that the driver sent to replicas, frames included; where rounds are Spark jobs, the parameters once."""
    received_bytes: int = 0
    """Bytes that it received from them."""
    aggregation: str = ""
    """How updates were added up: "star", on the driver, or "ring", among replicas."""
    retries: int = 0
    """Failed attempts before this round was committed."""
    failures: list[FailureRecord] = field(default_factory=list)
    """What failed, since the previous round."""
    slowest: int | None = None
    """The replica that computed the longest."""
    num_workers_changed: str = ""
    """With `min_workers`: "3 -> 2" where the rows were dealt anew before this round; else ""."""
    state_reset: list[int] = field(default_factory=list)
    """Replicas whose optimizer state was lost with their executor and began anew (`replica_state="local"`)."""
    replicas: list[ReplicaRecord] = field(default_factory=list)
    """Each replica's part."""
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    """With `work="gradient"`: every call of the outer optimizer's closure, in order; L-BFGS's line search makes several."""
    arrivals: list[list[int]] = field(default_factory=list)
    """With `asynchronous`: [replica, staleness] of every push, in the order in which they were applied. The staleness is how many
    pushes of others were applied since the replica had fetched; -1 where it only fetched. `history`
    and checkpoints keep those of the newest rounds, some 100,000; callbacks are given all of them."""

    def __getitem__(self, name: str) -> Any:
        """A field by name."""
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        """The fields' names, so that `dict(record)` works."""
        return [f.name for f in dataclasses.fields(self)]

    @property
    def rows_per_second(self) -> float:
        """Training rows a second, all replicas together."""
        return self.rows / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RoundRecord:
        """Make the record that `to_dict` described.

        Raises:
            DataError: it is not the record of a round.
        """
        if complaint := misfit(cls, values, defaults=True, nan=True):
            raise DataError(f"this is no round's record: {complaint}")
        parts = [ReplicaRecord(**r) for r in values.get("replicas", [])]
        failures = [FailureRecord(**f) for f in values.get("failures", [])]
        evaluations = [EvaluationRecord(**e) for e in values.get("evaluations", [])]
        return cls(**{**values, "replicas": parts, "failures": failures, "evaluations": evaluations})


def summary(records: Sequence[RoundRecord]) -> str:
    """Where the time of a run went, and what keeping replica states cost, in two lines."""
    total = sum(record.seconds for record in records)
    if not records or not total:
        return "no rounds were run"
    rows = sum(record.rows for record in records)
    shares = {
        "compute": sum(record.compute_seconds for record in records),
        "exchange": sum(record.exchange_seconds for record in records),
        "opening stages": sum(record.stage_seconds for record in records),
        "validation": sum(record.validation_seconds for record in records),
        "checkpoints": sum(record.checkpoint_seconds for record in records),
    }
    spent = ", ".join(f"{seconds / total:.0%} {what}" for what, seconds in shares.items() if seconds)
    state_s = sum(record.state_seconds for record in records) / len(records)
    state_mb = sum(record.state_bytes for record in records) / len(records) / 1e6
    kept_mb = sum(record.checkpoint_bytes for record in records) / 1e6
    return (
        f"{len(records)} rounds, {rows:,} rows in {total:.1f} s ({rows / total:,.0f} rows/s): {spent}\n"
        f"replica state: {state_mb:.2f} MB and {1000 * state_s:.1f} ms a round on the executors' disks, "
        f"{kept_mb:.2f} MB in checkpoints or snapshots altogether"
    )


def write_jsonl(records: Iterable[RoundRecord], path: Path) -> None:
    """Write one JSON object a line; NaN becomes null, which every JSON reader takes."""
    lines = [json.dumps(_plain(record.to_dict()), allow_nan=False) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_jsonl(path: Path) -> list[RoundRecord]:
    """Read the records that `write_jsonl` wrote; null becomes NaN.

    Raises:
        DataError: a line is not the record of a round.
        OSError: the file cannot be read.
    """
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            records.append(RoundRecord.from_dict(_numbers(json.loads(line))))
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} of {path} is no round's record: {error}") from error
    return records


def _numbers(value: Any) -> Any:
    if value is None:
        return math.nan
    if isinstance(value, dict):
        return {k: v if k in _MAY_BE_NONE else _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


PHASES: Final = ("compute", "exchange", "outer", "stage", "validation", "checkpoint")
"""The parts of a round's time: field `NAME_seconds` of the record."""


def numbers_of(record: RoundRecord) -> dict[str, float]:
    """Loss, validation scores, speed and seconds by phase; a round without validation has no such scores."""
    scores = {f"validation/{name}": value for name, value in record.metrics.items()}
    phases = {f"seconds/{phase}": float(getattr(record, f"{phase}_seconds")) for phase in PHASES}
    return {
        "loss": record.loss,
        **scores,
        "rows_per_second": record.rows_per_second,
        "epoch": float(record.epoch),
        "retries": float(record.retries),
        "seconds/round": record.seconds,
        **phases,
    }
