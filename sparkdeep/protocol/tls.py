"""A certificate for one run, made on the driver, and the only one that its replicas take: TLS 1.3 without an authority."""

from __future__ import annotations

import errno
import os
import secrets
import select
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar, final

from sparkdeep.errors import ConfigError, ProtocolError

__all__ = ["TlsSocket", "check_tls", "client_context", "server_context"]

# The key dies with the fit, so dates would protect nothing; they would only fail where a machine's clock is wrong.
_FIRST_DAY: Final = datetime(2000, 1, 1, tzinfo=UTC)
_LAST_DAY: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


def check_tls() -> None:
    """Whether this process can make a certificate.

    Raises:
        ConfigError: the package `cryptography` is not installed.
    """
    _cryptography()


def server_context() -> tuple[ssl.SSLContext, bytes]:
    """The driver's end with a new key, which never leaves this process, and its certificate (DER), which replicas need.

    Raises:
        ConfigError: the package `cryptography` is not installed.
    """
    x509, ec, hashes, serialization = _cryptography()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "sparkdeep")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_FIRST_DAY)
        .not_valid_after(_LAST_DAY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    password = secrets.token_hex(32).encode()
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password),
    )
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # no session is taken up again, and so nothing follows the handshake that is not a frame
    # OpenSSL's context takes a key from a file only. This one is encrypted, and gone before anybody connects; what a kill
    # in between leaves cannot be opened, as the password was in memory.
    with tempfile.TemporaryDirectory(prefix="sparkdeep-tls-") as folder:  # 0700
        path = Path(folder) / "key.pem"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(locked + certificate.public_bytes(serialization.Encoding.PEM))
        context.load_cert_chain(path, password=password)
    return context, bytes(certificate.public_bytes(serialization.Encoding.DER))


def client_context(certificate: bytes) -> ssl.SSLContext:
    """A replica's end: it takes nobody but the holder of the key to `certificate` (DER)."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the certificate is known byte for byte, and names no host
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=certificate)
    return context


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _cryptography() -> tuple[Any, Any, Any, Any]:
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ConfigError(
            "TLS on the coordinator's port needs the package 'cryptography' on the driver, which is not installed "
            f"({error}): pip install 'sparkdeep[tls]'. It is asked for by tls=True, or by Spark's own encryption; where the "
            "network is trusted, tls=False does without."
        ) from error
    return x509, ec, hashes, serialization


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
        # As of the plain socket.
        self.setsockopt = sock.setsockopt
        self.getpeername = sock.getpeername
        self.getsockname = sock.getsockname
        self.fileno = sock.fileno

    @classmethod
    def open(cls, sock: socket.socket, context: ssl.SSLContext, *, check: Callable[[], None]) -> TlsSocket:
        """The end of `sock` whose the context is, after the handshake.

        Args:
            sock: connected; closed when this fails.
            context: of the driver, with the run's certificate, or of a replica.
            check: called about four times a second while the other end keeps us waiting; raises to give up.

        Raises:
            OSError: the other end is gone, or speaks no TLS 1.3.
        """
        server_side = context.protocol == ssl.PROTOCOL_TLS_SERVER
        opened: TlsSocket | None = None
        try:
            sock.setblocking(False)
            opened = cls(context.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False))
            while True:
                try:
                    opened._attempt(opened._ssl.do_handshake)
                except TimeoutError:
                    check()
                else:
                    return opened
        except BaseException:
            (opened or sock).close()
            raise

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
            opened = cls.open(sock, context, check=check)
        except ssl.SSLCertVerificationError as error:
            raise ProtocolError(_OTHER_CERTIFICATE) from error
        if opened._ssl.getpeercert(binary_form=True) != certificate:
            opened.close()
            raise ProtocolError(_OTHER_CERTIFICATE)
        return opened

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
