"""What crosses between driver and replica: small typed headers; vectors and state follow as bodies.

A round, seen from the replica:

    driver -> train (RoundSpec; body: parameters, buffers)     replica -> beat ... (progress)
    replica -> update (Update: the header, admitted first;     replica -> saved (its state is on disk, if promised)
        body: vector, buffers, checksum)

The driver reads no update's body before the headers of all were found good. With `aggregation="ring"` an update has no vector:
once all are admitted, replicas add theirs up among themselves, and each sends its part of the mean:

    driver -> reduce (weights)                                 replica -> part (body: its part of the mean, checksum)

and between rounds: evaluate -> scores, state -> state, stop -> bye. Either side may see `error` or a closed line.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from sparkdeep.errors import ProtocolError

__all__ = ["Failure", "Hello", "Open", "Opened", "Saved", "Update", "parse", "to_header"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """A replica's first words."""

    run: str
    stage: str
    """Names this opening of the stage: a zombie of an earlier one is refused."""
    replica: int
    host: str
    pid: int
    device: str
    versions: dict[str, str]
    rows: dict[str, int]
    """Rows of its shard by split."""
    digest: str
    """Of its shard, order included."""
    shard: str
    """"" when it can read its shard, else what is wrong with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Open:
    """The driver's answer to a hello; the body holds the module's tensors, then the replica's state if it is sent."""

    committed: int
    """Committed rounds."""
    scheduler_steps: int
    """The common clock so far, for a state that starts anew in mid-run."""
    state: str
    """"fresh", "local" (read `committed`'s state from disk), "behind" (read the newest one from disk: the rounds after it
    went on without this replica) or "sent"."""
    tensor_bytes: int
    keep: bool
    """Whether to save state on the executor's disk after every round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """The replica stands: its model is built and its state restored."""

    state: str
    """"fresh", "restored" or "reset" (it was promised but is not there)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """The header of a replica's update; the body is asked for once every header is admitted."""

    round: int
    rows: int
    weight: float
    """Rows trained on this round, or their summed weights: the replica's weight in the mean; 0 when out of rows."""
    steps: int
    loss_sum: float
    """Sum over local steps of loss times the step's weight."""
    finite: bool
    """Whether every parameter and every loss of the round is finite."""
    sections: list[str]
    """Names of the optimizer state sections that follow the parameters (`inner_state="average"`)."""
    buffer_bytes: int
    compute_s: float
    input_s: float
    """Part of `compute_s` spent on getting batches."""
    logged: dict[str, float] = dataclasses.field(default_factory=dict)
    """Means of what the model logged itself."""

    @classmethod
    def absent(cls, round_number: int, told: Update | None = None) -> Update:
        """What stands for a replica that a round does not count, with the times that it told, if it did."""
        return cls(
            round=round_number,
            rows=0,
            weight=0.0,
            steps=0,
            loss_sum=0.0,
            finite=True,
            sections=[],
            buffer_bytes=0,
            compute_s=told.compute_s if told is not None else 0.0,
            input_s=told.input_s if told is not None else 0.0,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """The replica's part of the round is done; its state is as durable as promised."""

    bytes: int
    """Written to the executor's disk; 0 when nothing is kept there."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A replica's last words."""

    cause: str
    """"user" (the user's code raised), "lost" (environment) or "ours"."""
    message: str
    traceback: str
    where: str


_T = TypeVar("_T")


def to_header(message: Any) -> dict[str, Any]:
    """A message as a JSON-ready dict."""
    return dataclasses.asdict(message)


def parse(cls: type[_T], header: dict[str, Any]) -> _T:
    """Build `cls` from a received header, checking every field's type.

    Raises:
        ProtocolError: a field is missing, unknown or of the wrong type; the message names it.
    """
    hints = _hints(cls)  # type: ignore[arg-type]  # a class is hashable
    if header.keys() != hints.keys():
        odd = sorted(header.keys() ^ hints.keys())
        raise ProtocolError(f"{cls.__name__}: fields {odd} are missing or unknown.")
    for name, hint in hints.items():
        if not _fits(header[name], hint):
            raise ProtocolError(f"{cls.__name__}.{name} is {header[name]!r:.80}; expected {hint}.")
    return cls(**header)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is list:
        (item,) = typing.get_args(hint)
        return isinstance(value, list) and all(_fits(v, item) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, typing.get_args(hint)[1]) for v in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
