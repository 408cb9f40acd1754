"""A TLS connection that one thread reads while another writes, with the part of a socket's interface that frames need."""

from __future__ import annotations

import errno
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar, final

from sparkdeep.errors import ProtocolError

__all__ = ["TlsSocket"]

_POLL_S: Final = 0.25
# OpenSSL does not tell how far it is with what it was given: so much at a time keeps a slow line's deadlines alive.
_PIECE_BYTES: Final = 1 << 17

_RESULT = TypeVar("_RESULT")


@final
class TlsSocket:
    """The two ends of a connection that was encrypted after it was made.

    Python's SSLSocket is one object of OpenSSL, in which two threads must not be at once. Here every call of it is made
    under a lock and without waiting; the waiting is done outside of the lock, on the plain socket.

    Args:
        sock: a TLS socket that does not block, its handshake done or about to be; owned by this object from now on.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._ssl = sock
        self._lock = threading.Lock()
        self._closed = False
        self._timeout_s = _POLL_S
        self.family = sock.family

    @classmethod
    def accept(cls, sock: socket.socket, context: ssl.SSLContext, *, check: Callable[[], None]) -> TlsSocket:
        """The driver's end of `sock`.

        Args:
            sock: connected; closed when this fails.
            context: with the run's certificate.
            check: called about four times a second while the other end keeps us waiting; raises to give up.

        Raises:
            OSError: the other end is gone, or speaks no TLS 1.3.
        """
        return cls._open(sock, context, server_side=True, check=check)

    @classmethod
    def connect(
        cls, sock: socket.socket, context: ssl.SSLContext, *, certificate: bytes, timeout_s: float
    ) -> TlsSocket:
        """A replica's end of `sock`.

        Args:
            sock: connected; closed when this fails.
            context: that takes `certificate` only.
            certificate: the run's (DER).
            timeout_s: for the whole handshake.

        Raises:
            ProtocolError: the other end showed another certificate.
            OSError: it is gone, slow, or speaks no TLS 1.3.
        """
        deadline = time.monotonic() + timeout_s

        def check() -> None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no TLS handshake within {timeout_s:g} s")

        try:
            opened = cls._open(sock, context, server_side=False, check=check)
        except ssl.SSLCertVerificationError as error:
            raise ProtocolError(_OTHER_CERTIFICATE) from error
        if opened._ssl.getpeercert(binary_form=True) != certificate:
            opened.close()
            raise ProtocolError(_OTHER_CERTIFICATE)
        return opened

    @classmethod
    def _open(
        cls, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, check: Callable[[], None]
    ) -> TlsSocket:
        try:
            sock.setblocking(False)
            opened = cls(context.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False))
        except BaseException:
            sock.close()
            raise
        try:
            while True:
                try:
                    opened._attempt(opened._ssl.do_handshake)
                except TimeoutError:
                    check()
                else:
                    return opened
        except BaseException:
            opened.close()
            raise

    def send(self, data: memoryview) -> int:
        """Send a first part of `data`; returns its bytes.

        After a TimeoutError the next call must bring the same data, part of which may be on its way.

        Raises:
            TimeoutError: the other end took nothing in time.
            OSError: the connection broke, or was closed here.
        """
        return self._attempt(self._ssl.send, data[:_PIECE_BYTES])

    def recv_into(self, view: memoryview, num_bytes: int) -> int:
        """Receive at most `num_bytes` into `view`; returns how many, 0 at the end.

        Raises:
            TimeoutError: nothing came in time.
            OSError: the connection broke, or was closed here.
        """
        return self._attempt(self._ssl.recv_into, view, num_bytes)

    def pending(self) -> int:
        """Bytes that have come and are decrypted, and which no select would tell of."""
        with self._lock:
            return 0 if self._closed else self._ssl.pending()

    def settimeout(self, timeout_s: float) -> None:
        """How long `send` and `recv_into` wait."""
        self._timeout_s = timeout_s

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """As of the plain socket."""
        self._ssl.setsockopt(level, option, value)

    def getpeername(self) -> Any:
        """As of the plain socket."""
        return self._ssl.getpeername()

    def getsockname(self) -> Any:
        """As of the plain socket."""
        return self._ssl.getsockname()

    def fileno(self) -> int:
        """As of the plain socket; -1 when closed."""
        return self._ssl.fileno()

    def shutdown(self, how: int) -> None:
        """End the connection, waking whoever waits; without TLS's own farewell, as frames tell their length."""
        with self._lock:
            self._closed = True
            # Not SSLSocket's own: it turns the socket into a plain one under the feet of the thread that reads.
            socket.socket.shutdown(self._ssl, how)

    def close(self) -> None:
        """Let go of the socket."""
        with self._lock:
            self._closed = True
            self._ssl.close()

    def _attempt(self, operation: Callable[..., _RESULT], *arguments: Any) -> _RESULT:
        deadline = time.monotonic() + self._timeout_s
        while True:
            with self._lock:
                if self._closed:
                    raise OSError(errno.EBADF, "the connection was closed here")
                place = self._ssl.fileno()
                try:
                    return operation(*arguments)
                except ssl.SSLWantReadError:
                    awaited = select.POLLIN
                except ssl.SSLWantWriteError:
                    awaited = select.POLLOUT
            poll = select.poll()
            poll.register(place, awaited)
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poll.poll(left_s * 1000):
                raise TimeoutError("timed out")


_OTHER_CERTIFICATE: Final = (
    "whoever answers there is not this run's coordinator: it showed another certificate. Another program took the port, or "
    "something between executors and driver answers in its place (a proxy that ends TLS): let executors reach the driver "
    "itself, by coordinator_host= and coordinator_port=."
)
