"""The volume on which a folder lies: how much room it has, and whether it is a disk at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from sparkdeep.errors import DiskFullError, PreflightError

__all__ = ["LEAST_SHARD_BYTES", "MEMORY_KINDS", "Volume", "check_room", "room_for_shards", "volume_of"]

LEAST_SHARD_BYTES: Final = 16 << 20
"""Free space below which no shard is begun."""

MEMORY_KINDS: Final = frozenset({"tmpfs", "ramfs"})
"""File systems that are memory."""

_NETWORK: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "gpfs", "beegfs", "afs", "glusterfs"}
)
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_MIB: Final = 1 << 20


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
        if len(fields) < 5 or not rest:
            continue
        point = Path(_unescaped(fields[4]))
        if len(point.parts) >= best and (folder == point or point in folder.parents):
            best, found = len(point.parts), (str(point), rest.split(" ")[0])
    return found


def _unescaped(text: str) -> str:
    """Undo the kernel's octal escapes of space, tab, newline and backslash."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), os.fsencode(text)))
