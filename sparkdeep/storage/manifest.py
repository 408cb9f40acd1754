"""JSON manifests, which describe the files beside them: any one, that of a commit, and the checks before it is believed."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from sparkdeep.errors import CheckpointError, ConfigError, SparkdeepError
from sparkdeep.storage.store import JSON, Bytes, Store, check_name
from sparkdeep.versions import stamp

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_MANIFEST_BYTES",
    "Commit",
    "CommittedFiles",
    "DamagedError",
    "FileEntry",
    "Key",
    "commit_keys",
    "commit_name",
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
    return _sealed(json.dumps(body, indent=1, sort_keys=True).encode())


def _sealed(text: bytes) -> bytes:
    return b"".join([_HEAD, hashlib.sha256(text).hexdigest().encode(), _MIDDLE, text, _TAIL])


def decode(data: bytes) -> dict[str, Any]:
    """Return the body of a file made by `encode`; DamagedError for any other bytes."""
    text = data[len(_HEAD) + _DIGEST_LENGTH + len(_MIDDLE) : -len(_TAIL)]
    if data != _sealed(text):
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


# -- the commit file of one round -------------------------------------------------------------------------------------

FORMAT_VERSION = 2

Key: TypeAlias = tuple[int, int]
"""(round, epoch): which commit. Of one round the commit of the higher epoch counts."""

_NAME = re.compile(r"commits/(\d{6,18})(?:\.(\d{6,18}))?\.json")


def commit_name(key: Key) -> str:
    """Return the name of a commit file; without its epoch, -1, that of format 1."""
    round_number, epoch = key
    return f"commits/{round_number:06d}.json" if epoch < 0 else f"commits/{round_number:06d}.{epoch:06d}.json"


def commit_keys(names: Iterable[str]) -> list[Key]:
    """Return which commits there are, ascending; those of format 1 have the epoch -1."""
    matches = [match for match in map(_NAME.fullmatch, names) if match]
    keys = [(int(match[1]), -1 if match[2] is None else int(match[2])) for match in matches]
    return sorted(key for key, match in zip(keys, matches, strict=True) if commit_name(key) == match[0])


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What a commit file says, checked."""

    round_number: int
    """The round that it commits; part of its name too."""

    epoch: int
    """Of the lease under which it was made; part of its name too."""

    prefix: str
    """The folder of this round's files, `rounds/<round>.<nonce>`: a name that no other attempt has."""

    entries: Mapping[str, FileEntry]
    """Name under `prefix` -> length and digest."""

    state: Mapping[str, Any]
    """The caller's JSON state."""

    identity: Mapping[str, Any]
    """What makes two runs the same run."""

    def to_bytes(self) -> bytes:
        """Return the commit file; ConfigError if it would be too long to be read back."""
        data = encode(
            {
                "format_version": FORMAT_VERSION,
                "round": self.round_number,
                "epoch": self.epoch,
                "prefix": self.prefix,
                "files": {check_name(name): entry.to_json() for name, entry in self.entries.items()},
                "state": self.state,
                "identity": self.identity,
                **stamp(),
            }
        )
        if len(data) > MAX_MANIFEST_BYTES:
            raise ConfigError(
                f"the state of round {self.round_number} makes a manifest of {len(data)} bytes; at most "
                f"{MAX_MANIFEST_BYTES} are read back. Put large values into files"
            )
        return data

    @classmethod
    def from_bytes(cls, data: bytes, key: Key) -> Commit:
        """Check and read the commit file of `key`.

        Raises:
            DamagedError: it is not as it was written, is of another round, or names files outside its own folder.
            CheckpointError: it is intact, but of a format that this version does not read.
        """
        round_number, epoch = key
        body = decode(data)
        if body.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint of round {round_number} has format {str(body.get('format_version'))[:40]}; this "
                f"sparkdeep reads format {FORMAT_VERSION}. Resume with the version that wrote it: "
                f"{str(body.get('versions'))[:200]}"
            )
        prefix, files, state, identity = (body.get(key) for key in ("prefix", "files", "state", "identity"))
        if body.get("round") != round_number or body.get("epoch") != epoch:
            raise DamagedError(
                f"it says it is round {str(body.get('round'))[:40]} of epoch {str(body.get('epoch'))[:40]}"
            )
        if not isinstance(prefix, str) or not re.fullmatch(rf"rounds/{round_number:06d}\.[0-9a-f]{{16}}", prefix):
            raise DamagedError(f"its files are said to lie under {str(prefix)[:100]!r}, not in a folder of this round")
        if not isinstance(files, dict) or not isinstance(state, dict) or not isinstance(identity, dict):
            raise DamagedError("files, state and identity must be JSON objects")
        try:
            entries = {check_name(name): FileEntry.from_json(name, value) for name, value in files.items()}
        except ConfigError as exc:
            raise DamagedError(str(exc)) from exc
        return cls(
            round_number=round_number, epoch=epoch, prefix=prefix, entries=entries, state=state, identity=identity
        )

    def read(self, store: Store, name: str) -> bytes:
        """Return the file `name`, verified; DamagedError if it is not what was committed."""
        return self.entries[name].read(store, f"{self.prefix}/{name}")


class CommittedFiles(Mapping[str, bytes]):
    """The files of one commit, read when asked for."""

    def __init__(self, store: Store, commit: Commit) -> None:
        self._store = store
        self._commit = commit

    def __getitem__(self, name: str) -> bytes:
        try:
            return self._commit.read(self._store, name)
        except (DamagedError, OSError) as exc:
            raise CheckpointError(
                f"a checkpoint file in {self._store.uri} changed or went away after it was verified: {exc}; "
                "run again to resume from what is intact now"
            ) from exc

    def __iter__(self) -> Iterator[str]:
        return iter(self._commit.entries)

    def __len__(self) -> int:
        return len(self._commit.entries)
