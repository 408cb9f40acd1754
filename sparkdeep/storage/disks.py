"""Disks: the volume on which a folder lies, how much room it has, and the replica states that an executor keeps there."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from sparkdeep.errors import DiskFullError, PreflightError, ReplicaLostError

__all__ = [
    "LEAST_SHARD_BYTES",
    "MEMORY_KINDS",
    "StateFiles",
    "Volume",
    "check_room",
    "own_files",
    "room_for_shards",
    "volume_of",
]

LEAST_SHARD_BYTES: Final = 16 << 20
"""Free space below which no shard is begun."""

MEMORY_KINDS: Final = frozenset({"tmpfs", "ramfs"})
"""File systems that are memory."""

_NETWORK: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "gpfs", "beegfs", "afs", "glusterfs"}
)
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_MIB: Final = 1 << 20
_STATE: Final = re.compile(r"round-(\d{9})\.([\w-]+)\.safetensors")


@final
@dataclass(frozen=True, kw_only=True)
class Volume:
    """What a folder lies on, at one moment."""

    path: str
    """The folder that was asked about."""
    mount: str
    """Where the volume is mounted; "" if the system does not say."""
    kind: str
    """Of its file system, such as "ext4", "overlay" or "tmpfs"; "" if the system does not say."""
    free_bytes: int
    """What this user may still write; quotas are not seen."""
    total_bytes: int

    @property
    def in_memory(self) -> bool:
        """Whether what is written there takes memory, and is gone with the machine."""
        return self.kind in MEMORY_KINDS

    @property
    def network(self) -> bool:
        """Whether it lies on another machine."""
        return self.kind in _NETWORK or self.kind.startswith("fuse.")

    def described(self) -> str:
        """Path, kind, size and free space, for messages."""
        nature = ", which is memory" if self.in_memory else ", over the network" if self.network else ""
        return (
            f"{self.path} (on {self.mount or 'an unknown mount'}, {self.kind or 'kind unknown'}{nature}; "
            f"{self.free_bytes / _MIB:.1f} MiB of {self.total_bytes / _MIB:.1f} MiB free)"
        )

    def to_json(self) -> dict[str, Any]:
        """The volume as JSON values."""
        return dict(vars(self))


def volume_of(path: str | Path) -> Volume:
    """The volume of a folder, or, where it is not made yet, of the nearest one above it.

    Raises:
        OSError: the system does not say.
    """
    folder = Path(path).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    mount, kind = _mount_of(folder.resolve())
    return Volume(path=str(path), mount=mount, kind=kind, free_bytes=usage.free, total_bytes=usage.total)


def check_room(volume: Volume, least_bytes: int, what: str, remedy: str) -> None:
    """Refuse a volume with less free space than `least_bytes`.

    Raises:
        PreflightError: naming the volume, what it is for and what to do.
    """
    if volume.free_bytes < least_bytes:
        raise PreflightError(
            f"{what} needs about {least_bytes / _MIB:.1f} MiB, and there is less room in {volume.described()}. {remedy}"
        )


@contextlib.contextmanager
def room_for_shards(folder: Path) -> Iterator[None]:
    """While a shard is written to `folder`: a disk that fills up is named, and the unfinished shard removed.

    Raises:
        PreflightError: there is almost no room from the start.
        DiskFullError: it filled up.
    """
    remedy = (
        "Set spark.local.dir (SPARK_LOCAL_DIRS on YARN and standalone workers) to a larger disk, use more executors, or "
        "give shard_dir= on shared storage."
    )
    check_room(volume_of(folder), LEAST_SHARD_BYTES, "a shard", remedy)
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        full = volume_of(folder)
        shutil.rmtree(folder, ignore_errors=True)  # at once: Spark itself needs the room
        raise DiskFullError(
            f"the disk is full while a shard was written: {error.strerror} in {full.described()}; the unfinished shard was "
            f"removed. {remedy}"
        ) from error


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
        found = (_STATE.fullmatch(path.name) for path in self._directory.iterdir())
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


def _mount_of(folder: Path) -> tuple[str, str]:
    """Mount point and kind of file system: of the longest mount point above `folder`, the last mounted of equals."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return "", ""  # not Linux
    best, found = -1, ("", "")
    for line in lines:
        mounted, _, rest = line.partition(" - ")
        fields = mounted.split(" ")
        if len(fields) >= 5 and rest:
            point = Path(_unescaped(fields[4]))
            if len(point.parts) >= best and folder.is_relative_to(point):
                best, found = len(point.parts), (str(point), rest.split(" ")[0])
    return found


def _unescaped(text: str) -> str:
    """Undo the kernel's octal escapes of space, tab, newline and backslash."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), os.fsencode(text)))
