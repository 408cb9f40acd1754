"""The driver's end of the parameter plane: a port that admits this run's replicas and nobody else."""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final, final

from sparkdeep.checks import shown
from sparkdeep.errors import ConfigError, ProtocolError
from sparkdeep.protocol.messages import Address, Hello, parse
from sparkdeep.protocol.tls import TlsSocket, server_context
from sparkdeep.protocol.wire import TOKEN_BYTES, Connection

__all__ = ["Coordinator", "parse_ports"]

_HANDSHAKE_S: Final = 20.0
_MAX_HANDSHAKES: Final = 256


def parse_ports(value: int | tuple[int, int] | str | None) -> range:
    """The ports to try: None or 0 any free one, a number that one, `(first, last)` or "first-last" a range.

    Raises:
        ConfigError: not a port or a range of ports.
    """
    pair: Any = value
    if value is None or (value == 0 and not isinstance(value, bool)):
        return range(1)
    if isinstance(value, str):
        pieces = [p.strip() for p in value.split("-")]
        if all(p.isdecimal() and len(p) <= 20 for p in pieces) and len(pieces) in {1, 2}:
            pair = (int(pieces[0]), int(pieces[-1]))
    elif isinstance(value, int):
        pair = (value, value)
    if isinstance(pair, tuple | list) and len(pair) == 2 and all(type(p) is int for p in pair):
        first, last = pair
        if 1 <= first <= last <= 65535:
            return range(first, last + 1)
    raise ConfigError(
        f"coordinator_port={shown(value)}: must be a port from 1 to 65535, a pair (first, last) or 'a-b'."
    )


@final
class Coordinator:
    """Listens on the driver for the whole of a fit; stages come and go behind it.

    On Linux, replicas on the driver's own host come in by a Unix socket without a file, which is cheaper than TCP; it is
    gone with the process, and whoever dials it needs the token as on the port. With TLS they too come by the port.

    Args:
        bind_host: the address to listen on.
        advertised_host: what replicas are told to dial.
        ports: tried in order; `range(1)` means any free port.
        tls: whether the port speaks TLS, with a certificate of its own that `address` tells.

    Raises:
        ConfigError: no port of the range is free, the address is not this machine's, or a package for TLS is missing.
    """

    def __init__(self, *, bind_host: str, advertised_host: str, ports: range, tls: bool = False) -> None:
        self.token: Final = secrets.token_bytes(TOKEN_BYTES)
        self._tls: ssl.SSLContext | None = None
        certificate = b""
        if tls:
            self._tls, certificate = server_context()
        self._listener = _listen(bind_host, ports)
        self._nearby = _listen_nearby() if not tls else None
        self.address = Address(
            host=advertised_host,
            port=self._listener.getsockname()[1],
            nearby=self._nearby.getsockname()[1:].decode() if self._nearby is not None else "",
            certificate=certificate,
        )
        self._admit: Callable[[Hello, Connection], None] | None = None
        self._lock = threading.Lock()
        self._handshakes = threading.Semaphore(_MAX_HANDSHAKES)
        self._closed = False
        self._listeners = [one for one in (self._listener, self._nearby) if one is not None]
        self._threads = [
            threading.Thread(target=self._accept, args=(one,), name="sparkdeep-coordinator", daemon=True)
            for one in self._listeners
        ]
        for thread in self._threads:
            thread.start()

    def route(self, admit: Callable[[Hello, Connection], None] | None) -> None:
        """Hand the hellos of new replicas to `admit` (called in a thread of its own); None refuses them all."""
        with self._lock:
            self._admit = admit

    def close(self) -> None:
        """Stop listening; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for listener in self._listeners:
            with contextlib.suppress(OSError):  # not every system lets a listening socket be shut down
                listener.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
            listener.close()
        for thread in self._threads:
            thread.join(timeout=5.0)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                if self._closed:
                    return
                continue
            except OSError as error:
                if self._closed or error.errno in {errno.EBADF, errno.EINVAL}:
                    return
                continue  # a connection that was reset before it was accepted
            if not self._handshakes.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._welcome, args=(sock,), name="sparkdeep-hello", daemon=True).start()

    def _welcome(self, sock: socket.socket) -> None:
        connection: Connection | None = None
        authenticated = False
        try:
            deadline = time.monotonic() + _HANDSHAKE_S

            def give_up() -> None:
                self._give_up(deadline)

            line = sock if self._tls is None else TlsSocket.open(sock, self._tls, check=give_up)
            connection = Connection(line, self.token, check=give_up)
            frame = connection.receive(timeout_s=_HANDSHAKE_S)
            authenticated = True
            if frame.kind != "hello" or frame.body_bytes:
                raise ProtocolError(f"expected a hello, got {frame.kind!r} with {frame.body_bytes} bytes.")
            hello = parse(Hello, frame.header)
            with self._lock:
                admit = self._admit
            if admit is None:
                raise ProtocolError("no stage is open.")
            admit(hello, connection)
        except (ProtocolError, OSError) as error:
            # A stranger hears nothing (a frame would show it the token); a zombie of an earlier stage hears why.
            if connection is None:
                sock.close()
                return
            if authenticated:
                with contextlib.suppress(ProtocolError, OSError):  # it may have hung up already
                    connection.send("refused", {"reason": str(error)}, timeout_s=2.0)
            connection.close()
        finally:
            self._handshakes.release()

    def _give_up(self, deadline: float) -> None:
        # The deadline is of the whole handshake: a stranger who sends a byte now and then holds no thread for long.
        if self._closed or time.monotonic() > deadline:
            raise ProtocolError("the handshake took too long, or the coordinator closed.")


def _listen_nearby() -> socket.socket | None:
    """A listening Unix socket in Linux's abstract namespace, where it has no file; None elsewhere."""
    if sys.platform != "linux":
        return None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0sparkdeep-{secrets.token_hex(16)}")
    listener.listen(128)
    listener.settimeout(0.25)
    return listener


def _listen(host: str, ports: range) -> socket.socket:
    problem: OSError | None = None
    for port in ports:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        except OSError as error:
            problem = error
            break
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(128)
        except OSError as error:
            listener.close()
            problem = error
            continue
        listener.settimeout(0.25)
        return listener
    raise ConfigError(
        f"the coordinator cannot listen on {host} port {ports.start}"
        f"{f'-{ports[-1]}' if len(ports) > 1 else ''}: {problem}. Set coordinator_port= to a free port or range, and "
        "spark.driver.bindAddress to an address of the driver's machine."
    )
