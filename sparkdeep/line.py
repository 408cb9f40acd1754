"""The driver's end of one replica's connection: what it says in words of the protocol, or why it cannot go on."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final, final

import torch
from torch import Tensor

from sparkdeep.averaging import OrderedSum
from sparkdeep.errors import ProtocolError, ReplicaLostError, SparkdeepError, UserCodeError
from sparkdeep.messages import Failure, Hello, Update, parse
from sparkdeep.parameters import raw_bytes
from sparkdeep.trees import unpack_tensors
from sparkdeep.wire import Connection, Frame

__all__ = ["Line"]

_MAX_STATE_BYTES: Final = 1 << 36


@final
class Line:
    """One replica, as the driver sees it.

    Args:
        hello: its first words.
        connection: to it.
        stall_timeout_s: silence that counts as a loss while it works.
        on_beat: called with (replica, rows of the round so far).
        on_log: called with (replica, line) for what it prints.
    """

    def __init__(
        self,
        hello: Hello,
        connection: Connection,
        *,
        stall_timeout_s: float,
        on_beat: Callable[[int, int], None],
        on_log: Callable[[int, str], None],
    ) -> None:
        self.hello = hello
        self.connection = connection
        self.waiting = True
        """Whether the replica waits for the driver, and should be told now and then that it is alive."""
        self._stall_s = stall_timeout_s
        self._on_beat = on_beat
        self._on_log = on_log

    @property
    def who(self) -> str:
        """The replica with its host and process, for messages."""
        return f"replica {self.hello.replica} on {self.hello.host} (process {self.hello.pid})"

    def expect(self, kind: str, *, timeout_s: float | None = None) -> Frame:
        """The next frame of `kind`; beats and printed lines on the way there are passed on.

        Args:
            kind: of the frame.
            timeout_s: of silence; None for that of a replica at work.

        Raises:
            UserCodeError, ReplicaLostError, SparkdeepError: the replica reports a failure.
            ProtocolError: it sent something else.
        """
        replica = self.hello.replica
        while True:
            frame = self.connection.receive(timeout_s=timeout_s or self._stall_s)
            if frame.kind == kind:
                return frame
            if frame.body_bytes:
                raise ProtocolError(f"replica {replica} sent {frame.kind!r} with a body; expected {kind!r}.")
            if frame.kind == "beat":
                self._on_beat(replica, int(frame.header.get("rows", 0)))
            elif frame.kind == "log":
                self._on_log(replica, str(frame.header.get("text", "")))
            elif frame.kind == "error":
                raise self._failed(parse(Failure, frame.header))
            else:
                raise ProtocolError(f"replica {replica} sent {frame.kind!r}; expected {kind!r}.")

    def answer(self, kind: str) -> bytes:
        """The body of the next frame of `kind`."""
        self.waiting = False
        frame = self.expect(kind)
        data = self.connection.read_body(frame.body_bytes, limit_bytes=_MAX_STATE_BYTES, timeout_s=self._stall_s)
        self.waiting = True
        return data

    def add_update(
        self, update: Update, total: OrderedSum, dtype: torch.dtype, own_buffer_bytes: int, check: Callable[[], None]
    ) -> dict[str, Tensor]:
        """Add the update's body to the sum as it arrives; returns its buffers.

        Raises:
            ReplicaLostError: the body was damaged on its way; the round is void.
        """
        frame = self.expect("body")
        vector_bytes = total.numel * dtype.itemsize
        limit_bytes = 2 * own_buffer_bytes + 4096
        if frame.body_bytes != vector_bytes + update.buffer_bytes or update.buffer_bytes > limit_bytes:
            raise ProtocolError(
                f"replica {self.hello.replica} announced a body of {frame.body_bytes} bytes; expected {vector_bytes} of "
                f"parameters and {own_buffer_bytes} of buffers."
            )
        chunk = torch.empty(min(total.chunk, total.numel), dtype=dtype)
        crc = 0

        def chunks(start: int, stop: int) -> Tensor:
            nonlocal crc
            part = chunk[: stop - start]
            view = raw_bytes(part)
            self.connection.read_into(view, timeout_s=self._stall_s)
            crc = zlib.crc32(view, crc)
            return part

        total.add(self.hello.replica, chunks, check)
        buffers = self.connection.read_body(update.buffer_bytes, limit_bytes=limit_bytes, timeout_s=self._stall_s)
        if zlib.crc32(buffers, crc) != update.crc32:
            raise ReplicaLostError(
                f"the update of {self.who} was damaged on its way (checksum differs); the round is void.",
                replica=self.hello.replica,
                host=self.hello.host,
            )
        return unpack_tensors(buffers)

    def _failed(self, failure: Failure) -> SparkdeepError:
        replica, host = self.hello.replica, self.hello.host
        if failure.cause == "user":
            return UserCodeError(
                f"{failure.traceback.rstrip()}\n\n{failure.message}\n(raised on {self.who}, in {failure.where}; not retried)",
                replica=replica,
                host=host,
                traceback_text=failure.traceback,
            )
        if failure.cause == "lost":
            text = f"{self.who} failed in {failure.where}: {failure.message}\n{failure.traceback.rstrip()}"
            return ReplicaLostError(text, replica=replica, host=host)
        return SparkdeepError(f"{self.who} failed in {failure.where}: {failure.message}\n{failure.traceback}")
