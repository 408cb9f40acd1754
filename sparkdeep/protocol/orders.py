"""What crosses between driver and replica where no connection does: an order goes out with a job, replies come back.

The wire of `messages.py` is a conversation; an order holds all of its driver's side at once, and a reply all of the
replica's. Bytes of any size travel as parcels: inside the order, or by a name under which the replica finds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from sparkdeep.errors import ReplicaLostError
from sparkdeep.protocol.plans import RoundSpec, ShardFacts
from sparkdeep.protocol.values import Globals
from sparkdeep.storage.opening import open_store
from sparkdeep.tensors.parameters import Layout, raw_bytes
from sparkdeep.tensors.state_dicts import pack_tensors, unpack_tensors

if TYPE_CHECKING:
    from sparkdeep.data.schema import Schema
    from sparkdeep.settings.local import LocalSettings

__all__ = ["Inline", "JobRunner", "Order", "Parcel", "Reply", "Stored", "digest_of", "pack_globals", "unpack_globals"]

Buffer = bytes | bytearray | memoryview


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
    """Inside the order itself."""

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


@dataclass(frozen=True, kw_only=True)
class Order:
    """What every replica of one job does: a round, the scores of the global parameters, or a look at its state."""

    run: str
    job: str
    """Unique to this attempt: files and replies that carry another one are a zombie's."""
    kind: Literal["train", "evaluate", "states"]
    settings: LocalSettings
    schema: Schema
    facts: tuple[ShardFacts, ...]
    """The ledger; a replica whose shard differs refuses."""
    versions: dict[str, str]
    """The driver's."""
    committed: int
    """Committed rounds."""
    scheduler_steps: int
    """The common clock so far, for a state that starts anew in mid-run."""
    source: Literal["fresh", "local", "sent"]
    """Where each replica's state comes from."""
    kept_by: str
    """With "local": the job that kept the states after the committed round."""
    durable: bool
    """Whether a state that is gone voids the job, instead of starting anew."""
    sections: tuple[str, ...]
    """Names of averaged optimizer state that follows the parameters in `start`."""
    start: Parcel | None = None
    """`pack_globals`: what the round starts from, or what is scored."""
    program: Parcel | None = None
    """`program.pack_program`."""
    fixed: Parcel | None = None
    """Parameters that are not trained, as `state_dicts.pack_tensors`."""
    states: tuple[Parcel, ...] = ()
    """With source "sent": one a replica."""
    spec: RoundSpec | None = None
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
    """One replica's answer to an order."""

    header: dict[str, Any]
    """JSON-ready."""
    bodies: tuple[Buffer, ...] = ()

    @property
    def body(self) -> bytes:
        """The bodies in one piece."""
        return bytes(self.bodies[0]) if len(self.bodies) == 1 else b"".join(self.bodies)


class JobRunner(Protocol):
    """Runs orders: one job, one task a replica."""

    num_replicas: int
    keeps_states: bool
    """Whether replicas keep their states from job to job; where not, a task may run anywhere, and more than once."""

    @property
    def exchange(self) -> str | None:
        """The folder in which replicas exchange updates, as they name it, or None."""

    def ship(self, slot: str, data: bytes) -> Parcel:
        """Get `data` on its way; what the slot held before is let go unless it is the same."""

    def run(self, order: Order, description: str, *, timeout_s: float, idle_timeout_s: float) -> Sequence[Reply]:
        """Run the order on every replica.

        Raises:
            SparkdeepError: what failed, by name; the job is over then, or cancelled.
        """

    def renew(self) -> None:
        """Make the shards anew before the next job: a replica did not find its own."""


def pack_globals(values: Globals) -> bytes:
    """Parameters, averaged optimizer state and buffers, one after the other."""
    return b"".join([raw_bytes(values.parameters), raw_bytes(values.inner), pack_tensors(values.buffers)])


def unpack_globals(data: Buffer, layout: Layout, sections: Sequence[str]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The parameters (numel,), the optimizer state (len(sections) * numel,) and the buffers."""
    split = layout.num_bytes
    end = split * (1 + len(sections))
    vector = torch.frombuffer(bytearray(memoryview(data)[:end]), dtype=layout.dtype)
    return vector[: layout.numel], vector[layout.numel :], unpack_tensors(bytes(memoryview(data)[end:]))
