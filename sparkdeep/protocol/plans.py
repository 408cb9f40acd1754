"""What a replica is told of itself: where to dial in, which shard is its own, what it is made from, which steps to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sparkdeep.data.schema import Schema
    from sparkdeep.settings.local import LocalSettings

__all__ = ["Address", "Position", "ReplicaPlan", "RoundSpec", "ShardFacts", "Ticket"]


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
    token: bytes = field(repr=False)
    run: str
    stage: str
    """Unique to this opening; what names a zombie."""
    connect_timeout_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class ReplicaPlan:
    """What every replica of a run is made from; the same for all stages."""

    program: bytes
    """`program.pack_program`."""
    settings: LocalSettings
    schema: Schema
