"""The body of an update as it comes in: the vector, the buffers, their checksum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

import torch
from torch import Tensor

from sparkdeep.errors import ProtocolError, ReplicaLostError
from sparkdeep.protocol.messages import Update
from sparkdeep.tensors.encoding import CHECKSUM_BYTES, Checksum
from sparkdeep.tensors.parameters import raw_bytes
from sparkdeep.tensors.state_dicts import unpack_tensors

__all__ = ["Body", "check_size"]

_PIECE_BYTES: Final = 1 << 20


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
