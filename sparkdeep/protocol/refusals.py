"""What is checked of a replica's words, and refused by name: its versions, its shard, an update's header and its body."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, final

import torch
from torch import Tensor

from sparkdeep.errors import (
    NonFiniteError,
    ProtocolError,
    ReplicaLostError,
    ShardMismatchError,
    SparkdeepError,
    UserCodeError,
    VersionMismatchError,
)
from sparkdeep.protocol.messages import Failure, Hello, ShardFacts, Update
from sparkdeep.tensors.encoding import CHECKSUM_BYTES, Checksum
from sparkdeep.tensors.parameters import raw_bytes
from sparkdeep.tensors.state_dicts import unpack_tensors

__all__ = [
    "MAX_SECTIONS",
    "Body",
    "check_shard",
    "check_size",
    "check_update",
    "check_updates",
    "check_versions",
    "common_sections",
    "failed",
    "not_finite",
]

MAX_SECTIONS: Final = 8
"""Optimizer states that replicas may average, at most."""
_PIECE_BYTES: Final = 1 << 20


def check_versions(own: dict[str, str], hellos: Sequence[Hello]) -> None:
    """Refuse replicas that run other versions than the driver's, `own`.

    Raises:
        VersionMismatchError: with a table.
    """
    if any(hello.versions != own for hello in hellos):
        table = "\n".join(f"  {h.host}: {h.versions}" for h in hellos)
        raise VersionMismatchError(
            f"driver and executors must run the same versions.\n  driver: {own}\n{table}\nInstall the driver's versions "
            "on the executors, or set spark.pyspark.python to an environment that has them."
        )


def check_shard(hello: Hello, facts: ShardFacts) -> None:
    """Refuse a replica whose shard is not the one that the ledger knows.

    Raises:
        ShardMismatchError: it was rebuilt from other rows, or in another order.
    """
    if (hello.digest, hello.rows) != (facts.digest, facts.rows):
        raise ShardMismatchError(
            f"the shard of replica {hello.replica} on {hello.host} was rebuilt with other rows, or in another "
            f"order: digest {hello.digest[:16]} of {hello.rows}, before {facts.digest[:16]} of {facts.rows}. The "
            "DataFrame is not deterministic (rand(), an unordered limit, a source that changed): write it to "
            "Parquet or a table first and fit from that."
        )


def check_update(replica: int, host: str, update: Update, round_number: int, *, allow_nonfinite: bool = False) -> None:
    """Refuse a header that must not be counted.

    Raises:
        NonFiniteError: the replica reports NaN or infinity, and that is not allowed; nothing was added.
        ProtocolError: the header does not belong to this round or makes no sense.
    """
    if update.round != round_number:
        raise ProtocolError(f"replica {replica} sent an update of round {update.round} in round {round_number}.")
    if not update.finite and not allow_nonfinite:
        raise not_finite(replica, host, round_number)
    negative = update.rows < 0 or (update.logged and not update.rows)  # what is logged is averaged over rows
    if not 0 <= update.weight < math.inf or negative or len(update.sections) > MAX_SECTIONS:
        raise ProtocolError(f"replica {replica} sent an update of weight {update.weight}, rows {update.rows}.")


def check_updates(updates: Sequence[Update], hosts: Sequence[str], round_number: int) -> list[str]:
    """Refuse a round of which one header is not good; gives what `common_sections` gives.

    Raises:
        NonFiniteError, ProtocolError: see `check_update`.
    """
    for replica, (update, host) in enumerate(zip(updates, hosts, strict=True)):
        check_update(replica, host, update, round_number)
    return common_sections(updates)


def not_finite(replica: int, host: str, round_number: int, more: str = "") -> NonFiniteError:
    """The error of a replica of which the loss, a parameter or a buffer is NaN or infinite."""
    return NonFiniteError(
        f"round {round_number}: the loss, a parameter or a buffer of replica {replica} on {host} became NaN or infinite; "
        f"the mean was not touched.{more} Lower the learning rate, set clip_grad_norm=, or check the data for values "
        "that overflow.",
        round_number=round_number,
        replica=replica,
    )


def failed(failure: Failure, hello: Hello) -> SparkdeepError:
    """The error of a replica whose last words were `failure`."""
    if failure.cause == "user":
        return UserCodeError(
            f"{failure.traceback.rstrip()}\n\n{failure.message}\n(raised on {hello.who}, in {failure.where}; not retried)",
            replica=hello.replica,
            host=hello.host,
            traceback_text=failure.traceback,
        )
    text = f"{hello.who} failed in {failure.where}: {failure.message}\n{failure.traceback.rstrip()}"
    if failure.cause == "lost":
        return ReplicaLostError(text, replica=hello.replica, host=hello.host)
    return SparkdeepError(text)


def common_sections(updates: Sequence[Update]) -> list[str]:
    """Names of the optimizer state that the replicas which count average.

    Raises:
        ProtocolError: they do not agree.
    """
    sections = {tuple(update.sections) for update in updates if update.weight > 0}
    if len(sections) > 1:
        raise ProtocolError(f"replicas average different optimizer states: {sorted(sections)}.")
    return list(sections.pop()) if sections else []


def check_size(replica: int, body_bytes: int, update: Update, vector_bytes: int, *, buffer_limit_bytes: int) -> None:
    """Refuse an update whose body has another size than its header says, or more buffers than there are.

    Raises:
        ProtocolError: with the numbers.
    """
    expected = vector_bytes + update.buffer_bytes + CHECKSUM_BYTES
    if body_bytes != expected or not 0 <= update.buffer_bytes <= buffer_limit_bytes:
        raise ProtocolError(
            f"replica {replica} announced a body of {body_bytes} bytes with {update.buffer_bytes} of buffers; expected "
            f"{vector_bytes} of parameters, at most {buffer_limit_bytes} of buffers and a checksum."
        )


@final
class Body:
    """Reads a body from wherever it comes from: a connection, or memory.

    Args:
        read: fills a view with the next bytes.
        who: whose it is, for messages.
        replica, host: likewise.
        scratch: uint8, for one chunk at a time; made as large as that.

    Raises (all methods):
        ReplicaLostError: it was damaged on its way; the round is void.
    """

    def __init__(
        self,
        read: Callable[[memoryview], object],
        *,
        who: str,
        replica: int,
        host: str = "",
        scratch: Tensor | None = None,
    ) -> None:
        self._read = read
        self._scratch = torch.empty(0, dtype=torch.uint8) if scratch is None else scratch
        self._who = who
        self.replica = replica
        self._host = host
        self._checksum = Checksum()

    def read(self, view: memoryview) -> None:
        """Fill `view` (bytes) with what comes next."""
        self._read(view)
        self._checksum.update(view)

    def chunk(self, num_bytes: int) -> Tensor:
        """What comes next, (num_bytes,) uint8, until it is asked for again."""
        if self._scratch.numel() < num_bytes:
            self._scratch.resize_(num_bytes)
        part = self._scratch[:num_bytes]
        self.read(raw_bytes(part))
        return part

    def fill(self, into: Tensor) -> None:
        """Fill a contiguous tensor."""
        view = raw_bytes(into)
        for start in range(0, view.nbytes, _PIECE_BYTES):
            self.read(view[start : start + _PIECE_BYTES])

    def buffers(self, num_bytes: int) -> dict[str, Tensor]:
        """The buffers, with which it ends."""
        data = bytearray(num_bytes)
        self.read(memoryview(data))
        self.verify()
        return unpack_tensors(bytes(data)) if data else {}

    def verify(self) -> None:
        """Its end: what was read is what was sent."""
        sent = bytearray(CHECKSUM_BYTES)
        self._read(memoryview(sent))
        if sent != self._checksum.digest():
            raise ReplicaLostError(
                f"the update of {self._who} was damaged on its way (checksum differs); the round is void.",
                replica=self.replica,
                host=self._host,
            )
