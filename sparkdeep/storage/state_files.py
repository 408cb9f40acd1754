"""Replica states on an executor's disk, one file a round, the last three kept."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from sparkdeep.errors import ReplicaLostError

__all__ = ["StateFiles", "own_files"]

_NAME = re.compile(r"round-(\d{9})\.([\w-]+)\.safetensors")


@contextlib.contextmanager
def own_files(what: str) -> Iterator[None]:
    """Turn an OSError inside into the loss of this replica: another executor's disk may work.

    Only for files of our own: an OSError of the user's code, such as a missing file, would happen again.

    Raises:
        ReplicaLostError: for any OSError.
    """
    try:
        yield
    except OSError as error:
        raise ReplicaLostError(f"this executor's disk failed while {what}: {type(error).__name__}: {error}") from error


class StateFiles:
    """The states of one replica of one run.

    A round's file replaces nothing until it is complete, and the previous round's stays: until the driver has committed a
    round, a repetition of it starts from the previous one. The page cache outlives the process, so no fsync is needed for
    what is promised: exact while the executor's disk lives.

    Each attempt writes under names of its own. One that was given up may run on for seconds, and must not overwrite what
    the next attempt keeps.

    Args:
        directory: of this replica.
        attempt: names the stage or job that writes.
    """

    def __init__(self, directory: Path, attempt: str) -> None:
        self._directory = directory
        self._attempt = attempt
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def kept(self) -> list[tuple[int, str]]:
        """(round, attempt) of every state that is here, ascending."""
        found = (_NAME.fullmatch(path.name) for path in self._directory.iterdir())
        return sorted((int(match[1]), match[2]) for match in found if match)

    def read(self, round_number: int, attempt: str) -> bytes:
        """The state after `round_number`, as the given attempt kept it.

        Raises:
            FileNotFoundError: it is not here.
        """
        return self._path(round_number, attempt).read_bytes()

    def write(self, round_number: int, data: bytes) -> None:
        """Keep the state after `round_number`, and of earlier rounds only the last two.

        Two, because the round being written may never count, and the one before it may have gone on without this
        replica, so that the driver goes back to the one before that.
        """
        temporary = self._directory / f".{secrets.token_hex(8)}.part"
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        temporary.replace(self._path(round_number, self._attempt))
        older = [(kept, attempt) for kept, attempt in self.kept() if kept < round_number]
        recent = sorted({kept for kept, _ in older})[-2:]
        for kept, attempt in older:
            if kept not in recent:
                self._path(kept, attempt).unlink(missing_ok=True)

    def _path(self, round_number: int, attempt: str) -> Path:
        return self._directory / f"round-{round_number:09d}.{attempt}.safetensors"
