"""Which process a folder belongs to, and whether that process is provably dead."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from sparkdeep.fields import misfit

__all__ = ["Owner", "is_dead", "owner_of_this_process"]

_PROC: Final = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process, told apart from every other that ever has its number."""

    pid: int | None
    """Process number in its namespace; None where there is no /proc to ask."""
    start: int | None
    """Clock ticks from boot to the process's start."""
    boot_id: str | None
    """The kernel's name for this boot."""
    pid_namespace: str | None
    """Where `pid` is valid: containers on one machine each count from 1."""
    hostname: str
    """The machine's, or in a container the container's, name."""
    uid: int
    """The user."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values from which `from_json` makes an equal owner."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Owner:
        """Make the owner that `to_json` described.

        Raises:
            TypeError: other keys, or a number that is none.
        """
        if complaint := misfit(cls, value):
            raise TypeError(complaint)
        owner = cls(**value)
        if owner.pid is not None and not 0 < owner.pid < 1 << 31:
            raise TypeError(f"{owner.pid} is no process number")
        return owner


def owner_of_this_process() -> Owner:
    """Return the executor's JVM, the nearest ancestor named `java`; this process where there is none.

    Python workers come and go while the executor, and with it what they wrote, stays.
    """
    pid = os.getpid()
    found = pid
    while pid > 0:
        try:
            stat = _stat(pid)
        except PermissionError:
            break  # another user's process, and /proc hides those: no executor of ours
        if stat is None:
            break
        if stat.command == "java":
            found = pid
            break
        pid = stat.parent
    stat = _stat(found)
    return Owner(
        pid=None if stat is None else found,
        start=None if stat is None else stat.start,
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        hostname=socket.gethostname(),
        uid=os.geteuid(),
    )


def is_dead(owner: Owner) -> bool:
    """Return whether the owner is provably gone; False wherever that cannot be known from here."""
    if owner.boot_id is None or owner.pid is None or owner.start is None:
        return False
    boot_id = _boot_id()
    if boot_id is None:
        return False
    if owner.boot_id != boot_id:
        # Rebooted since; but on shared storage the record may be another, running machine's.
        return owner.hostname == socket.gethostname()
    if owner.pid_namespace is None or owner.pid_namespace != _pid_namespace():
        return False
    # Where /proc is missing, or hides other users' processes, absence proves nothing.
    if _stat(os.getpid()) is None or owner.uid != os.geteuid():
        return False
    try:
        stat = _stat(owner.pid)
    except PermissionError:
        return False
    return stat is None or stat.start != owner.start or stat.state in "ZX"


@dataclass(frozen=True, kw_only=True)
class _Stat:
    command: str
    state: str
    parent: int
    start: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
        return None
    # The command stands in parentheses and may hold any character, parentheses too.
    command, _, rest = text.partition("(")[2].rpartition(")")
    values = rest.split()
    return _Stat(command=command, state=values[0], parent=int(values[1]), start=int(values[19]))


def _boot_id() -> str | None:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    try:
        return os.readlink(_PROC / "self/ns/pid")  # noqa: PTH115  # it names no path
    except OSError:
        return None
