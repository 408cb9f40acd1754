"""The commit file of one round: its contents, the checks before it is believed, and the files it stands for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from sparkdeep.errors import CheckpointError, ConfigError
from sparkdeep.storage.manifest import MAX_MANIFEST_BYTES, DamagedError, FileEntry, decode, encode
from sparkdeep.storage.store import Store, check_name
from sparkdeep.versions import stamp

__all__ = ["Commit", "CommittedFiles", "Key", "commit_keys", "commit_name"]

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
