"""A certificate for one run, made on the driver, and the only one that its replicas take: TLS 1.3 without an authority."""

from __future__ import annotations

import os
import secrets
import ssl
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from sparkdeep.errors import ConfigError

__all__ = ["check_tls", "client_context", "server_context"]

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
    _load(context, locked + certificate.public_bytes(serialization.Encoding.PEM), password)
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


def _load(context: ssl.SSLContext, chain: bytes, password: bytes) -> None:
    # OpenSSL's context takes a key from a file only. This one is encrypted, and gone before anybody connects; what a kill
    # in between leaves cannot be opened, as the password was in memory.
    with tempfile.TemporaryDirectory(prefix="sparkdeep-tls-") as folder:  # 0700
        path = Path(folder) / "key.pem"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(chain)
        context.load_cert_chain(path, password=password)


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
