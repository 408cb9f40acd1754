"""What the driver asks of replicas, and what a round of them gives. A stage obeys many orders over a connection, a job one.

The wire of `messages.py` is a conversation; a job holds all of its driver's side at once, and a reply all of the
replica's. Bytes of any size travel as parcels: inside the job, or by a name under which the replica finds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, final

from torch import Tensor

from sparkdeep.errors import ProtocolError, ReplicaLostError
from sparkdeep.protocol.messages import Open, RoundSpec, Saved, ShardFacts, Update, parse
from sparkdeep.protocol.refusals import MAX_SECTIONS
from sparkdeep.protocol.wire import Buffer
from sparkdeep.storage.opening import open_store

if TYPE_CHECKING:
    from sparkdeep.data.schema import Schema
    from sparkdeep.settings.run import LocalSettings

__all__ = [
    "Globals",
    "Inline",
    "Job",
    "JobRunner",
    "Order",
    "Parcel",
    "Reply",
    "RoundResult",
    "RoundWork",
    "Stored",
    "Traffic",
    "digest_of",
    "mean_loss",
]


def digest_of(data: Buffer) -> str:
    """32 hexadecimal digits that name the bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class Parcel(Protocol):
    """Bytes on their way to replicas."""

    @property
    def digest(self) -> str:
        """`digest_of` the bytes."""

    def open(self) -> Buffer:
        """The bytes, on the replica's side.

        Raises:
            ReplicaLostError: they are not there, or damaged.
        """


@dataclass(frozen=True, kw_only=True)
class Inline:
    """Inside the job itself."""

    data: bytes
    digest: str

    def open(self) -> bytes:
        """The bytes."""
        return self.data


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Files of a store that replicas can read, in order."""

    folder: str
    names: tuple[str, ...]
    num_bytes: int
    digest: str

    def open(self) -> bytes:
        """Read the files, and check that they are what was sent."""
        store = open_store(self.folder)
        try:
            data = b"".join(store.read(name, max_bytes=self.num_bytes) for name in self.names)
        except OSError as error:
            raise ReplicaLostError(f"{self.names[0]} cannot be read from {store.uri}: {error}") from error
        return checked(data, self.digest, f"{self.names[0]} in {store.uri}")


def checked(data: bytes, digest: str, what: str) -> bytes:
    """Return `data` if it has the digest.

    Raises:
        ReplicaLostError: it was damaged on its way.
    """
    if digest_of(data) != digest:
        raise ReplicaLostError(f"{what} was damaged on its way: its checksum differs.")
    return data


@final
@dataclass(frozen=True, kw_only=True)
class Order:
    """What the driver asks of a replica: a round, the scores of parameters, or its state.

    Its body: parameters (before them those of a round ago, if `previous`), averaged optimizer state, buffers.
    """

    spec: RoundSpec | None = None
    """Of a round."""
    clock: int = 0
    """Steps of the replica's learning-rate schedule before it."""
    ahead: RoundSpec | None = None
    """The round that follows if the replica may begin it on its own (`overlap`)."""
    may_undo: bool = False
    """Whether the replica must be able to go back to where it was before the round."""
    previous: bool = False
    """Whether the parameters of a round ago come before those of the round."""
    parameters: Literal["whole", "change", "part", "held"] = "whole"
    """What the body has of them: all; what changed since the round before; in a ring, this replica's part of them, or nothing,
    as the replica holds the mean of the round before."""
    sections: list[str] = field(default_factory=list)
    """Names of averaged optimizer state."""
    buffer_bytes: int = 0
    n_fetch: int = 0
    n_push: int = 0
    """Local steps between fetches and pushes; 0: the round is synchronous."""

    @classmethod
    def of(cls, header: dict[str, Any]) -> Order:
        """The order that a header holds.

        Raises:
            ProtocolError: it is none, or no round can be done by it.
        """
        order = parse(cls, header)
        if len(order.sections) > MAX_SECTIONS:
            raise ProtocolError(
                f"the driver averages {len(order.sections)} optimizer states; at most {MAX_SECTIONS} exist."
            )
        return replace(order, spec=_round(header["spec"]), ahead=_round(header["ahead"]))

    @property
    def in_ring(self) -> bool:
        """Whether replicas add their updates up among themselves."""
        return self.parameters in {"part", "held"}


def _round(header: dict[str, Any] | None) -> RoundSpec | None:
    spec = None if header is None else RoundSpec(**header)
    if spec and (
        min(spec.round, spec.epoch, spec.first_step, spec.num_steps) < 0 or not (spec.num_steps or spec.own_clock)
    ):
        raise ProtocolError(f"the driver orders {spec}, which is no round.")
    return spec


@final
@dataclass(frozen=True, kw_only=True)
class Job:
    """One order to all replicas of a run, with what each needs that is built for it alone."""

    run: str
    name: str
    """Unique to this attempt: files and replies that carry another one are a zombie's."""
    kind: Literal["train", "evaluate", "state"]
    order: Order
    opening: Open
    """Where each replica's state comes from."""
    settings: LocalSettings
    schema: Schema
    facts: tuple[ShardFacts, ...]
    """The ledger; a replica whose shard differs refuses."""
    versions: dict[str, str]
    """The driver's."""
    durable: bool
    """Whether a state that is gone voids the job, instead of starting anew."""
    body: Parcel | None = None
    """Of the order."""
    program: Parcel | None = None
    """`packing.pack_program`."""
    fixed: Parcel | None = None
    """Parameters that are not trained, as `state_dicts.pack_tensors`."""
    states: tuple[Parcel, ...] = ()
    """With states that are sent: one a replica."""
    exchange: str | None = None
    """The folder in which replicas lay their updates for the first one to average; None: they are in the replies."""
    wide: bool = True
    """Whether the mean travels in float64, for an outer optimizer, or rounded once to the vector's dtype."""
    stale: tuple[str, ...] = ()
    """Folders of the exchange that the first replica removes."""
    timeout_s: float = 600.0
    """For the first replica's wait for the others' updates."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One replica's answer to a job."""

    header: dict[str, Any]
    """JSON-ready."""
    bodies: tuple[Buffer, ...] = ()

    @property
    def body(self) -> bytes:
        """The bodies in one piece."""
        return bytes(self.bodies[0]) if len(self.bodies) == 1 else b"".join(self.bodies)


class JobRunner(Protocol):
    """Runs jobs, one task a replica."""

    num_replicas: int
    keeps_states: bool
    """Whether replicas keep their states from job to job; where not, a task may run anywhere, and more than once."""

    @property
    def exchange(self) -> str | None:
        """The folder in which replicas exchange updates, as they name it, or None."""

    def ship(self, slot: str, data: bytes) -> Parcel:
        """Get `data` on its way; what the slot held before is let go unless it is the same."""

    def run(self, job: Job, description: str, *, timeout_s: float, idle_timeout_s: float) -> Sequence[Reply]:
        """Run the job on every replica.

        Raises:
            SparkdeepError: what failed, by name; the job is over then, or cancelled.
        """

    def renew(self) -> None:
        """Make the shards anew before the next job: a replica did not find its own."""


@dataclass(frozen=True, kw_only=True)
class Globals:
    """What every replica starts a round from."""

    parameters: Tensor
    """(numel,) in the layout's dtype; with a lossy `down_codec`, what replicas know of the global parameters."""
    buffers: dict[str, Tensor]
    sections: list[str]
    """Names of averaged optimizer state, with `inner_state="average"`."""
    inner: Tensor
    """(len(sections) * numel,)."""
    encoded: bytes | None = None
    """With a lossy `down_codec`: what leads to `parameters` from what replicas knew a round ago."""
    previous: Tensor | None = None
    """With `overlap`: the parameters of a round ago, (numel,), which a replica that is new to the stage needs."""
    base: Tensor | None = None
    """Where updates are differences: (numel,), what their mean is added to; else None."""


@dataclass(frozen=True, kw_only=True)
class RoundWork:
    """What replicas do in a round, and how long it may take."""

    specs: Sequence[RoundSpec]
    """One a replica, all of the same round."""
    clocks: Sequence[int]
    """Steps of every replica's learning-rate schedule before it."""
    rows: Sequence[int]
    """Training rows of every replica's shard."""
    deadline_s: float | None = None
    """For the whole round; None: only silence is a failure."""

    @property
    def round(self) -> int:
        """Its number, from 1."""
        return self.specs[0].round


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of one round at the driver, frames included."""

    sent_bytes: int = 0
    received_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """The mean of one round."""

    mean: Tensor
    """(numel,): float64 for an outer optimizer, in the layout's dtype for plain averaging; the next round overwrites it."""
    buffers: dict[str, Tensor]
    sections: list[str]
    inner: Tensor
    """(len(sections) * numel,): mean of the optimizer states, likewise."""
    loss: float
    updates: list[Update]
    hosts: Sequence[str] = ()
    """By replica."""
    reset: Sequence[int] = ()
    """Replicas that began the round with a fresh optimizer, as their state was lost."""
    saved: list[Saved]
    seconds: float
    traffic: Traffic = field(default_factory=Traffic)
    dropped: Mapping[int, str] = field(default_factory=dict)
    """Replicas that the round does not count, and why: "late", "nonfinite" or "rolled back"."""
    passed_over: Mapping[int, int] = field(default_factory=dict)
    """Steps that they had taken, as far as they said."""
    rolled_back: bool = False
    """Whether nobody counts, and all replicas are where they were before the round."""
    arrivals: list[list[int]] = field(default_factory=list)
    """With `asynchronous`: [replica, staleness] in the order in which replicas came in."""


def mean_loss(updates: Sequence[Update]) -> float:
    """Of all steps of a round, by their weights; NaN where nobody counts."""
    weight = sum(update.weight for update in updates)
    return sum(update.loss_sum for update in updates) / weight if weight else float("nan")
