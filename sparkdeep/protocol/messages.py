"""What driver and replica tell each other in small: where a replica belongs, and headers, which bodies follow.

A round, seen from the replica:

    driver -> train (Order; body: parameters, buffers)         replica -> beat ... (progress)
    replica -> update (Update: the header, admitted first;     replica -> saved (its state is on disk, if promised)
        body: vector, buffers, checksum)

The driver reads no update's body before the headers of all were found good. With `aggregation="ring"` an update has no vector:
once all are admitted, replicas add theirs up among themselves, and each sends its part of the mean:

    driver -> reduce (weights)                                 replica -> part (body: its part of the mean, checksum)

In an asynchronous window (`asynchronous`), replicas come in between their steps, each when it is there:

    replica -> visit (Visit; body: what it changed, checksum)  driver -> fetched (body: parameters), if it fetches

and between rounds: evaluate -> scores, state -> state, stop -> bye. Either side may see `error` or a closed line.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from sparkdeep.checks import fits, misfit, shown
from sparkdeep.errors import ProtocolError

if TYPE_CHECKING:
    from sparkdeep.data.schema import Schema
    from sparkdeep.settings.run import LocalSettings

__all__ = [
    "TRIAL_BYTES",
    "Address",
    "Failure",
    "Hello",
    "Open",
    "Opened",
    "Position",
    "ReplicaPlan",
    "RoundSpec",
    "Saved",
    "ShardFacts",
    "Ticket",
    "Update",
    "Visit",
    "field",
    "parse",
    "to_header",
]


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


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the coordinator listens, as replicas see it."""

    host: str
    port: int
    nearby: str = ""
    """Name of its Unix socket, for replicas on the driver's own host; "" where there is none."""
    certificate: bytes = b""
    """The only one that a replica takes (DER); empty where the port speaks no TLS."""


@dataclass(frozen=True, kw_only=True)
class ShardFacts:
    """What the ledger knows of one shard, from the first time it was written."""

    rows: dict[str, int]
    digest: str


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What a replica needs to join one opening of the stage."""

    address: Address
    token: bytes = dataclasses.field(repr=False)
    run: str
    stage: str
    """Unique to this opening; what names a zombie."""
    connect_timeout_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class ReplicaPlan:
    """What every replica of a run is made from; the same for all stages."""

    program: bytes
    """`packing.pack_program`."""
    settings: LocalSettings
    schema: Schema


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

    @property
    def who(self) -> str:
        """The replica with its host and process, for messages."""
        return f"replica {self.replica} on {self.host} (process {self.pid})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Open:
    """The driver's answer to a hello; the body holds the module's tensors, then the replica's state if it is sent."""

    committed: int
    """Committed rounds."""
    scheduler_steps: int
    """The common clock so far, for a state that starts anew in mid-run."""
    state: str
    """"fresh", "local" (read it from disk) or "sent"."""
    kept_round: int
    """With "local": the round after which it was kept; later ones went on without this replica."""
    kept_by: str
    """The stage that kept it."""
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
    changed: list[str] = dataclasses.field(default_factory=list)
    """Attributes that the round has changed, and that nothing carries."""

    @classmethod
    def absent(cls, round_number: int, header: Update | None = None) -> Update:
        """What stands for a replica that a round does not count, with the times that its header gives, if it sent one."""
        return cls(
            round=round_number,
            rows=0,
            weight=0.0,
            steps=0,
            loss_sum=0.0,
            finite=True,
            sections=[],
            buffer_bytes=0,
            compute_s=header.compute_s if header is not None else 0.0,
            input_s=header.input_s if header is not None else 0.0,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """A replica comes in between two steps of an asynchronous window."""

    round: int
    steps: int
    """Its local steps in the window so far."""
    pushes: bool
    """Whether the body is what it has changed since its last push, with a checksum; else there is none."""
    fetches: bool
    """Whether it waits for the global parameters."""
    finite: bool
    """Whether all that it pushes is finite."""


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
    """A message as a JSON-ready dict; lists and dicts in it are shared, as `dataclasses.asdict` would copy them every round."""
    values = ((name, getattr(message, name)) for name in message.__dataclass_fields__)
    return {name: to_header(value) if dataclasses.is_dataclass(value) else value for name, value in values}


def parse(cls: type[_T], header: dict[str, Any]) -> _T:
    """Build `cls` from a received header, checking every field's type.

    Raises:
        ProtocolError: a field is missing, unknown or of the wrong type; the message names it.
    """
    if complaint := misfit(cls, header):
        raise ProtocolError(complaint)
    return cls(**header)


def field(header: dict[str, Any], name: str, kind: Any) -> Any:
    """One field of a received header that has no class of its own, of the type `kind`.

    Raises:
        ProtocolError: it is missing or of another type; the message names it.
    """
    if name not in header or not fits(header[name], kind):
        raise ProtocolError(f"the field {name!r} of a header is {shown(header.get(name))}; expected {kind}.")
    return header[name]


TRIAL_BYTES: Final = 4 << 20
"""What each replica exchanges in a trial, at most."""
