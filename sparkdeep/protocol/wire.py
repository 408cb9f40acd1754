"""Frames on a socket: magic, token, kind, a bounded JSON header, and a body that is streamed.

    magic "SPD1" | token (32 bytes) | header length u32 | body length u64 | header (JSON) | body

Every frame carries the run's token and is checked before its header is read; sizes are bounded before anything is
allocated. Both ends of the parameter plane (`driver_link.py`, `link.py`) speak through `Connection`.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from sparkdeep.errors import ProtocolError
from sparkdeep.protocol.tls import TlsSocket

__all__ = ["HEADER_LIMIT_BYTES", "TOKEN_BYTES", "Connection", "ConnectionLostError", "Frame", "SilentError"]

_MAGIC: Final = b"SPD1"
TOKEN_BYTES: Final = 32
HEADER_LIMIT_BYTES: Final = 1 << 20
_PREFIX: Final = struct.Struct(">4s32sIQ")
_POLL_S: Final = 0.25
_REQUEST_BYTES: Final = 1 << 20
# Memory for a body before any of it came in; what came in doubles it.
_UNSEEN_BYTES: Final = 1 << 24
# So much a sender can be ahead on a Unix socket, if the system lets it.
_NEARBY_BYTES: Final = 4 << 20
# A frame of at most this many bytes goes out in one piece: one packet, and one time that the other end wakes up.
_JOINED_BYTES: Final = 1 << 16

Buffer = bytes | bytearray | memoryview


class ConnectionLostError(ProtocolError):
    """The other end closed the connection, or kept silent past the deadline."""


class SilentError(ConnectionLostError):
    """The other end kept silent past the deadline; its line still stands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """A frame's head; its body of `body_bytes` is still on the socket."""

    kind: str
    header: dict[str, Any]
    body_bytes: int


class Connection:
    """One end of a connection between the coordinator and a replica.

    Sending is safe from several threads (a frame goes out whole); receiving is for one thread.

    Args:
        sock: a connected stream socket, plain or TLS; owned by this object from now on.
        token: the run's random token.
        check: called about four times a second while waiting; raises to give up.
    """

    def __init__(
        self, sock: socket.socket | TlsSocket, token: bytes, *, check: Callable[[], None] = lambda: None
    ) -> None:
        assert len(token) == TOKEN_BYTES
        self._nearby = sock.family == getattr(socket, "AF_UNIX", None)
        if self._nearby:  # whose buffers do not grow by themselves, as TCP's do
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _NEARBY_BYTES)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(_POLL_S)
        self._socket = sock
        self._token = token
        self._sending = threading.Lock()
        self.check = check
        self.peer = "a process of this host" if self._nearby else str(sock.getpeername())
        self._poll = select.poll()  # unlike select, it takes descriptors above 1023, of which a notebook may have many
        self._poll.register(sock.fileno(), select.POLLIN | select.POLLHUP | select.POLLERR)
        self.until = math.inf
        """When `late` is called, in `time.monotonic`, however much still comes and goes."""
        self.late: Callable[[], None] = lambda: None
        self.sent_bytes = 0
        self.received_bytes = 0
        self.heard = time.monotonic()
        """When a frame last came in: while the other end speaks, it is not gone, though it may take nothing."""

    @property
    def local_host(self) -> str:
        """The address of this end, as the other one sees it; "" on a Unix socket."""
        return "" if self._nearby else str(self._socket.getsockname()[0])

    def readable(self, wait_s: float = 0.0) -> bool:
        """Whether a frame, or the end of the connection, can be read, now or within `wait_s`."""
        if isinstance(self._socket, TlsSocket) and self._socket.pending():
            return True
        return bool(self._poll.poll(1000 * wait_s))

    def send(self, kind: str, header: dict[str, Any] | None = None, *bodies: Buffer, timeout_s: float = 60.0) -> None:
        """Send one frame; its body is the concatenation of `bodies`.

        Raises:
            ConnectionLostError: the other end is gone or took nothing for `timeout_s`.
        """
        self.stream(kind, header, sum(memoryview(b).nbytes for b in bodies), bodies, timeout_s=timeout_s)

    def stream(
        self,
        kind: str,
        header: dict[str, Any] | None,
        body_bytes: int,
        pieces: Iterable[Buffer],
        *,
        timeout_s: float = 60.0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Send one frame whose body is made piece by piece while it is sent.

        Args:
            kind: of the frame.
            header: JSON-ready, or None.
            body_bytes: what the pieces are together.
            pieces: of the body, each asked for when the one before is on its way.
            timeout_s: as for `send`.
            check: called about four times a second while the other end takes nothing, as the connection's own `check` is.

        Raises:
            ConnectionLostError: the other end is gone, or for `timeout_s` took nothing and said nothing.
        """
        head = self._head(kind, header, body_bytes)
        with self._sending:
            if len(head) + body_bytes <= _JOINED_BYTES:
                self._write(memoryview(b"".join([head, *pieces])), timeout_s, check)
                return
            self._write(memoryview(head), timeout_s, check)
            left = body_bytes
            for piece in pieces:
                view = memoryview(piece).cast("B")
                left -= view.nbytes
                self._write(view, timeout_s, check)
            assert left == 0, f"a body of {body_bytes} bytes was announced; {body_bytes - left} were given"

    def try_send(self, kind: str, header: dict[str, Any] | None = None) -> None:
        """Send a frame without a body unless another one is on its way, which is a sign of life too."""
        if self._sending.acquire(blocking=False):
            try:
                self._write(memoryview(self._head(kind, header, 0)), 1.0, bounded=False)
            finally:
                self._sending.release()

    def receive(self, *, timeout_s: float) -> Frame:
        """The head of the next frame.

        Raises:
            ConnectionLostError: nothing came for `timeout_s`, or the connection was closed.
            ProtocolError: wrong magic or token, a header that is too long or is not a JSON object.
        """
        prefix = bytearray(_PREFIX.size)
        self._read(memoryview(prefix), timeout_s)
        magic, token, header_bytes, body_bytes = _PREFIX.unpack(prefix)
        if not hmac.compare_digest(token, self._token) or magic != _MAGIC:
            raise ProtocolError(f"a frame from {self.peer} does not carry this run's token; the connection is closed.")
        if header_bytes > HEADER_LIMIT_BYTES:
            raise ProtocolError(f"a frame header of {header_bytes} bytes exceeds {HEADER_LIMIT_BYTES}.")
        text = bytearray(header_bytes)
        self._read(memoryview(text), timeout_s)
        try:
            document = json.loads(bytes(text))
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"a frame header from {self.peer} is not JSON: {error}") from error
        if not isinstance(document, dict) or not isinstance(document.get("kind"), str):
            raise ProtocolError(f"a frame header from {self.peer} has no kind.")
        self.heard = time.monotonic()
        return Frame(kind=document.pop("kind"), header=document, body_bytes=body_bytes)

    def read_into(self, view: memoryview, *, timeout_s: float) -> None:
        """Fill `view` (bytes) from the body of the current frame."""
        self._read(view, timeout_s)

    def read_body(self, num_bytes: int, *, limit_bytes: int, timeout_s: float) -> bytes:
        """A small body, whole.

        Memory is taken as the bytes come in: a length that is only announced takes none.

        Raises:
            ProtocolError: it is longer than `limit_bytes`, or its length makes no sense; nothing was allocated.
        """
        if not 0 <= num_bytes <= limit_bytes:
            raise ProtocolError(f"a body of {num_bytes} bytes from {self.peer} exceeds its limit of {limit_bytes}.")
        data = bytearray(min(num_bytes, _UNSEEN_BYTES))
        self._read(memoryview(data), timeout_s)
        while (have := len(data)) < num_bytes:
            data.extend(bytes(min(num_bytes - have, have)))
            self._read(memoryview(data)[have:], timeout_s)
        return bytes(data)

    def close(self) -> None:
        """Close the socket, waking a thread that waits on it."""
        with contextlib.suppress(OSError):  # the other end was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _head(self, kind: str, header: dict[str, Any] | None, body_bytes: int) -> bytes:
        assert header is None or "kind" not in header, "a header's field must not be called kind"
        text = json.dumps({**(header or {}), "kind": kind}).encode()
        if len(text) > HEADER_LIMIT_BYTES:
            raise ProtocolError(f"header of {len(text)} bytes for {kind!r} exceeds {HEADER_LIMIT_BYTES}.")
        return _PREFIX.pack(_MAGIC, self._token, len(text), body_bytes) + text

    def _write(
        self, view: memoryview, timeout_s: float, check: Callable[[], None] = lambda: None, *, bounded: bool = True
    ) -> None:
        last = time.monotonic()
        while view.nbytes:
            try:
                sent = self._socket.send(view[:_REQUEST_BYTES])
            except TimeoutError:
                self.check()
                check()
                if time.monotonic() - max(last, self.heard) > timeout_s:
                    raise ConnectionLostError(f"{self.peer} took nothing for {timeout_s:g} s.") from None
                continue
            except OSError as error:
                raise ConnectionLostError(f"the connection to {self.peer} broke: {error}") from error
            view = view[sent:]
            self.sent_bytes += sent
            last = time.monotonic()
            if last > self.until and bounded:
                self.late()

    def _read(self, view: memoryview, timeout_s: float) -> None:
        last = time.monotonic()
        while view.nbytes:
            try:
                got = self._socket.recv_into(view, min(view.nbytes, _REQUEST_BYTES))
            except TimeoutError:
                self.check()
                if time.monotonic() - last > timeout_s:
                    raise SilentError(f"{self.peer} sent nothing for {timeout_s:g} s.") from None
                continue
            except OSError as error:
                raise ConnectionLostError(f"the connection to {self.peer} broke: {error}") from error
            if not got:
                raise ConnectionLostError(f"{self.peer} closed the connection.")
            view = view[got:]
            self.received_bytes += got
            last = time.monotonic()
            if last > self.until:
                self.late()
