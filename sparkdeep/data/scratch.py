"""Where shards live on an executor, and removing what a killed executor left behind."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from sparkdeep.checks import misfit
from sparkdeep.errors import ConfigError

__all__ = ["Owner", "claim", "is_dead", "owner_of_this_process", "release", "sweep"]

_PROC: Final = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process, distinguished from every other that ever has the same number."""

    pid: int | None
    """Process number in its namespace; None where there is no /proc."""
    start: int | None
    """Clock ticks from boot to the process's start."""
    boot_id: str | None
    """The kernel's name for this boot."""
    pid_namespace: str | None
    """Where `pid` is valid: containers on one machine each count from 1."""
    hostname: str
    """The name of the machine, or of the container."""
    uid: int
    """The user."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values from which `from_json` makes an equal owner."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Owner:
        """Make the owner that `to_json` described.

        Raises:
            TypeError: the keys are others, or a number is not one.
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
            break  # another user's process, which /proc hides: not an executor of ours
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


_PREFIX: Final = "sparkdeep-"
_OWNER: Final = "owner.json"
_MAX_FOLDERS: Final = 2000  # a root shared with others may hold any number; looking must take only milliseconds
_MAX_ENTRIES: Final = 10_000  # per folder
_LEVELS: Final = 3  # from <root>/spark-*/executor-*/blockmgr-* up to <root>

# Below a root, Spark's block managers lie at these depths; see `_folders`.
_LAYOUTS: Final = (("blockmgr-",), ("spark-", "executor-", "blockmgr-"), ("", "blockmgr-"))

_log = logging.getLogger(__name__)


def claim(local_dirs: Sequence[str], run_id: str) -> Path:
    """Make this executor's folder for a run, `<local dir>/sparkdeep-<run_id>`, private to the user.

    The folder appears with its owner recorded inside, or not at all. All Python workers of one executor get the same
    one, every time; another live executor that shares the local directory gets one of its own.

    Args:
        local_dirs: the executor's local directories; the one with the most free space is taken.
        run_id: the run's name, of letters, digits, `.`, `_` and `-`.

    Raises:
        ConfigError: the run id is malformed, or none of the directories exists.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", run_id):
        raise ConfigError(f"run id {run_id!r}: 1 to 100 letters, digits, '.', '_' and '-' are needed; rename the run")
    roots = [Path(directory) for directory in local_dirs if Path(directory).is_dir()]
    if not roots:
        raise ConfigError(
            f"none of the local directories {list(local_dirs)} exists: shards need one; set spark.local.dir, or pass "
            "shard_dir="
        )
    owner = owner_of_this_process()
    # A second name for the executor whose neighbor, with the same local directory, came first.
    names = [f"{_PREFIX}{run_id}", f"{_PREFIX}{run_id}-{owner.pid}-{owner.start}"]
    for root, name in itertools.product(roots, names):
        if _read_owner(root / name) == owner:
            return root / name
    roomiest = max(roots, key=lambda root: shutil.disk_usage(root).free)
    for name in names:
        path = roomiest / name
        if _create(path, owner) or _read_owner(path) == owner:
            return path
    raise ConfigError(f"{path} belongs to another process: a run id is used once; start the run under another")


def sweep(local_dirs: Sequence[str], *, spare: str = "") -> list[Path]:
    """Remove folders that dead executors left in or near the given local directories.

    Looked at are the directories, up to three levels above them, and the places below those where Spark's block
    managers keep their files. A folder goes only when it is the user's own, no symbolic link, and its owner is provably
    dead; one that cannot be judged stays. At most 2000 folders are looked at.

    Args:
        local_dirs: where to look.
        spare: a run that goes on, whose shards on shared storage outlive the executor that wrote them; "" for none.

    Returns:
        The folders removed.
    """
    removed: list[Path] = []
    seen: set[Path] = set()
    for folder in itertools.islice(_folders([Path(directory) for directory in local_dirs]), _MAX_FOLDERS):
        if folder in seen:
            continue
        seen.add(folder)
        for name in _children(folder, _PREFIX):
            path = folder / name
            if spare and name.startswith(f"{_PREFIX}{spare}"):
                continue
            owner = _read_owner(path)
            if owner is not None and is_dead(owner) and _remove(path):
                removed.append(path)
    return removed


def release(path: Path) -> None:
    """Remove a folder that `claim` made; one that is gone already is fine."""
    assert path.name.startswith(_PREFIX), f"{path} is not a folder made by claim"
    _remove(path)


def _create(path: Path, owner: Owner) -> bool:
    """Make the folder with its owner inside in one step; False where it exists."""
    unnamed = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    unnamed.mkdir(mode=0o700)
    with os.fdopen(os.open(unnamed / _OWNER, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(owner.to_json(), file)
    try:
        unnamed.rename(path)  # refuses a folder that is not empty, and every claimed one holds its owner
    except OSError:
        if not os.path.lexists(path):
            raise
        _remove(unnamed)
        return False
    return True


def _read_owner(path: Path) -> Owner | None:
    """Return who owns a folder; None where it is not ours, is a link, or does not say so."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW
        folder = os.open(path, flags | os.O_DIRECTORY)
        try:
            if os.fstat(folder).st_uid != os.geteuid():
                return None
            with os.fdopen(os.open(_OWNER, flags | os.O_NONBLOCK, dir_fd=folder), "rb") as file:
                return Owner.from_json(json.loads(file.read(4096)))
        finally:
            os.close(folder)
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _remove(path: Path) -> bool:
    """Remove a folder, its owner's record last, so that whatever a kill in between leaves can still be judged."""
    try:
        for name in _children(path, ""):
            if name == _OWNER:
                continue
            inner = path / name
            if inner.is_dir() and not inner.is_symlink():
                shutil.rmtree(inner)
            else:
                inner.unlink(missing_ok=True)
        (path / _OWNER).unlink(missing_ok=True)
        path.rmdir()
    except FileNotFoundError:
        return False  # another sweeper was here first
    except OSError as error:
        _log.warning("cannot remove %s: %s", path, error)
        return False
    return True


def _folders(local_dirs: Sequence[Path]) -> Iterator[Path]:
    """Yield the folders in which claimed folders may lie, the likeliest first."""
    yield from local_dirs
    # Of the ancestors the last is the file system's root, which holds no local directories.
    ancestors = [list(path.resolve().parents)[:-1][:_LEVELS] for path in local_dirs]
    roots = list(dict.fromkeys(itertools.chain.from_iterable(ancestors)))
    yield from roots
    for layout, root in itertools.product(_LAYOUTS, roots):
        yield from _below(root, layout)


def _below(root: Path, layout: Sequence[str]) -> Iterator[Path]:
    for name in _children(root, layout[0]):
        path = root / name
        if path.is_symlink() or not path.is_dir():
            continue
        yield path
        if len(layout) > 1:
            yield from _below(path, layout[1:])


def _children(folder: Path, prefix: str) -> list[str]:
    """Return the names in a folder that begin with a prefix; none if it is gone or we may not read it."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in itertools.islice(entries, _MAX_ENTRIES) if entry.name.startswith(prefix)]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
