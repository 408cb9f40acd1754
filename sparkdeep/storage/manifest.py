"""JSON manifests, which describe the files beside them, and the checks before one is believed."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparkdeep.errors import ConfigError, SparkdeepError
from sparkdeep.storage.store import JSON, Bytes, Store

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_MANIFEST_BYTES",
    "DamagedError",
    "FileEntry",
    "decode",
    "encode",
    "flat_differences",
    "plain_json",
    "read_bounded",
]

MAX_MANIFEST_BYTES = 64 << 20
MAX_FILE_BYTES = 1 << 40

_HEAD = b'{"sha256":"'
_MIDDLE = b'","manifest":'
_TAIL = b"}\n"
_DIGEST_LENGTH = 64  # number of hexadecimal digits of a SHA-256


class DamagedError(SparkdeepError):
    """A stored file is missing, truncated, altered or not ours; callers turn it into their own error."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Length and digest of one stored file. The digest shows damage; it does not show who wrote the file."""

    num_bytes: int
    """Length of the file."""

    sha256: str
    """SHA-256 of the file, in lowercase hexadecimal."""

    @classmethod
    def of(cls, data: Bytes) -> FileEntry:
        """Describe `data`."""
        return cls(num_bytes=memoryview(data).nbytes, sha256=hashlib.sha256(data).hexdigest())

    def to_json(self) -> dict[str, JSON]:
        """Return the entry as JSON values."""
        return {"bytes": self.num_bytes, "sha256": self.sha256}

    @classmethod
    def from_json(cls, name: str, value: object) -> FileEntry:
        """Read the entry of the file `name`; DamagedError unless it is plain and bounded."""
        match value:
            case {"bytes": int(num_bytes), "sha256": str(sha256)} if not isinstance(num_bytes, bool):
                if 0 <= num_bytes <= MAX_FILE_BYTES and len(sha256) == _DIGEST_LENGTH:
                    return cls(num_bytes=num_bytes, sha256=sha256)
        raise DamagedError(
            f"the entry of {name!r} is {str(value)[:100]}; it must have bytes from 0 to {MAX_FILE_BYTES} and a sha256"
        )

    def read(self, store: Store, name: str) -> bytes:
        """Return the file `name`, which must be what this entry describes.

        Raises:
            DamagedError: it is absent, or has another length or digest.
            OSError: the store could not be read, which says nothing about the file.
        """
        data = read_bounded(store, name, self.num_bytes)
        if len(data) != self.num_bytes:
            raise DamagedError(f"{name} has {len(data)} bytes where its manifest says {self.num_bytes}")
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise DamagedError(f"{name} does not have the SHA-256 that its manifest says")
        return data


def read_bounded(store: Store, name: str, max_bytes: int) -> bytes:
    """Read `name`, at most `max_bytes` long; DamagedError if absent, longer, or a link."""
    try:
        return store.read(name, max_bytes=max_bytes)
    except FileNotFoundError as exc:
        raise DamagedError(f"{name} is missing") from exc
    except OSError as exc:
        if exc.errno in {errno.EFBIG, errno.ELOOP}:
            raise DamagedError(f"{name}: {exc.strerror}") from exc
        raise


def encode(body: Mapping[str, JSON]) -> bytes:
    """Return `body` as a JSON file that carries its own SHA-256, so that any changed byte shows.

    Raises:
        TypeError: `body` holds something that JSON does not.
        ValueError: `body` holds itself.
    """
    text = json.dumps(body, indent=1, sort_keys=True).encode()
    return b"".join([_HEAD, hashlib.sha256(text).hexdigest().encode(), _MIDDLE, text, _TAIL])


def decode(data: bytes) -> dict[str, Any]:
    """Return the body of a file made by `encode`; DamagedError for any other bytes."""
    digest_end = len(_HEAD) + _DIGEST_LENGTH
    text = data[digest_end + len(_MIDDLE) : -len(_TAIL)]
    digest = hashlib.sha256(text).hexdigest().encode()
    if data != b"".join([_HEAD, digest, _MIDDLE, text, _TAIL]):
        raise DamagedError("it is not a manifest as it was written: its SHA-256 does not fit its text")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise DamagedError(f"it is not JSON: {exc}") from exc
    if not isinstance(body, dict):
        raise DamagedError(f"it is a JSON {type(body).__name__}, not an object")
    return body


def plain_json(what: str, value: Mapping[str, JSON]) -> dict[str, Any]:
    """Return `value` as it will read back: tuples as lists, keys as strings.

    Raises:
        ConfigError: a value is not JSON; the message names its key under `what`.
    """
    plain = {}
    for key, item in value.items():
        try:
            plain[str(key)] = json.loads(json.dumps(item))
        except (TypeError, ValueError, RecursionError) as exc:
            raise ConfigError(
                f"{what}[{key!r}] is {type(item).__name__}, which JSON cannot hold ({exc}); give plain numbers, "
                "strings, lists and dictionaries, and put arrays into files"
            ) from exc
    return plain


def flat_differences(stored: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return "key: stored vs. now" for each key, dotted for nested objects, whose values differ as JSON."""
    differences = []
    for key in sorted(stored.keys() | now.keys()):
        old, new = stored.get(key, _ABSENT), now.get(key, _ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences += flat_differences(old, new, f"{prefix}{key}.")
        elif _shown(old) != _shown(new):
            differences.append(f"{prefix}{key}: {_shortened(old)} vs. {_shortened(new)}")
    return differences


_ABSENT = object()


def _shown(value: object) -> str:
    # As text, since 1 == 1.0 == True in Python, and a NaN differs from itself.
    return "(absent)" if value is _ABSENT else json.dumps(value, sort_keys=True)


def _shortened(value: object, limit: int = 80) -> str:
    text = _shown(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
