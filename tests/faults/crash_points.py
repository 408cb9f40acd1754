"""Every disk that a crash of the driver could leave, recorded from real runs; and what a new driver makes of each.

A run of the in-process twin writes its checkpoints while the system calls that change the folder are watched. Before each
of them, and after the last, the folder is copied: that is the disk of a driver that died there. Where a file or a folder's
entry was not synced yet, the disks on which power was lost are recorded too: the file empty or cut in half, the entry not
there or still the old one. From every disk that differs a new fit goes on; its result must be the undisturbed one's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD, AdamW
from twin import deal, facts_of, flat, local_coordinator, make_fit_on, schema_of, write_shards
from twin_faults import marked_table

from sparkdeep.models.program import Program
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.local import LocalStore

__all__ = ["Crashes", "crash_everywhere"]

SIZES = [12, 8]
X, Y = marked_table(SIZES)
Disk = dict[str, bytes | None]  # path below the folder -> content, None for a folder


@dataclass
class Crashes:
    """What was tried, and what came of it."""

    points: int = 0
    """Places at which the driver dies: before every changing system call and after the last one."""
    unsynced: int = 0
    """Further disks, with what was not synced yet lost or cut."""
    disks: int = 0
    """Different ones among all of these."""
    recovered: int = 0
    """Of which a new fit went on to the undisturbed run's result, bit for bit."""
    wrong: list[str] = field(default_factory=list)
    """The others, by the call before which the driver died."""


@dataclass(frozen=True)
class Point:
    """A disk after a crash."""

    where: str
    disk: Disk
    returned: int
    """The last round whose save had returned, -1 for none: at least that one must be there."""
    most: int
    """The newest round that may be there."""


class Watch:
    """Records disks while the driver changes a folder."""

    CALLS = ("open", "mkdir", "fsync", "rename", "link", "unlink", "rmdir")

    def __init__(self, folder: Path, *, returned: int = -1, more: int = 1) -> None:
        self.folder = folder
        self.more = more
        self.points: list[Point] = []
        self.unsynced: list[Point] = []
        self.returned = returned
        self._entries: dict[
            str, tuple[str, bytes | None]
        ] = {}  # folder -> its last new name, and what was there before
        self._real = {name: getattr(os, name) for name in self.CALLS}
        self._busy = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        for name in self.CALLS:
            setattr(os, name, partial(self._call, name))
        try:
            yield
        finally:
            for name, real in self._real.items():
                setattr(os, name, real)
        self._record("the end")

    def _call(self, name, *args, **kwargs):
        path = self._path(name, args, kwargs)
        if self._busy or path is None or (name == "open" and not args[1] & os.O_CREAT):
            return self._real[name](*args, **kwargs)
        self._record(f"{name} {path}")
        if name == "fsync":
            self._lose(path)
        if name in {"rename", "link"}:
            target = self._below(args[1])
            old = self.folder / target
            self._entries[str(Path(target).parent)] = (target, old.read_bytes() if old.exists() else None)
        return self._real[name](*args, **kwargs)

    def _path(self, name, args, kwargs) -> str | None:
        if name == "fsync":
            return self._below(os.readlink(f"/proc/self/fd/{args[0]}"))
        folder = kwargs.get("dir_fd")
        path = args[0] if folder is None else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), args[0])
        return self._below(path)

    def _below(self, path) -> str | None:
        try:
            return Path(os.fspath(path)).relative_to(self.folder).as_posix()
        except ValueError:
            return None

    def _record(self, where: str) -> None:
        self.points.append(self._point(where, self._disk()))

    def _point(self, where: str, disk: Disk) -> Point:
        return Point(where, disk, self.returned, self.returned + self.more)

    def _lose(self, path: str) -> None:
        """Power is lost before `path` is synced."""
        disk = self._disk()
        if disk.get(path) is not None:
            for kept, what in ((0, "empty"), (len(disk[path]) // 2, "cut")):
                self.unsynced.append(self._point(f"fsync {path}: {what}", disk | {path: disk[path][:kept]}))
        elif path in self._entries:
            target, old = self._entries.pop(path)
            lost = {name: data for name, data in disk.items() if name != target}
            if old is not None:
                lost[target] = old
            self.unsynced.append(self._point(f"fsync {path}: without {target}", lost))

    def _disk(self) -> Disk:
        self._busy = True
        try:
            found = sorted(self.folder.rglob("*"))
            return {p.relative_to(self.folder).as_posix(): None if p.is_dir() else p.read_bytes() for p in found}
        finally:
            self._busy = False


def crash_everywhere(*, codec: str = "int8") -> Crashes:
    """Crash at every change of the disk in three fits: a fresh one, one that goes on with it, one that starts over."""
    with tempfile.TemporaryDirectory() as name:
        return _Enumeration(Path(name), codec).run()


class _Enumeration:
    def __init__(self, root: Path, codec: str) -> None:
        self._root = root
        self._schema = schema_of(X, Y)
        self._shards = write_shards(root / "shards", deal(X, Y, SIZES), self._schema)
        assert len(facts_of(self._shards)) == len(SIZES)
        self._lossy = {"codec": codec, "error_feedback": codec != "identity"}

    def run(self) -> Crashes:
        expected, _ = self._fit(None)
        folder = self._root / "watched"
        watch = Watch(folder)
        folder.mkdir()
        with watch.watching():
            self._fit(folder, stop_after=2, saved=lambda number: setattr(watch, "returned", number))
            self._fit(folder, saved=lambda number: setattr(watch, "returned", number))
        over = Watch(folder, more=len(X))  # starting over, any of the old rounds may still be there, or none
        with over.watching():
            self._fit(folder, resume=False, stop_after=1)
        crashes = Crashes(
            points=len(watch.points) + len(over.points), unsynced=len(watch.unsynced) + len(over.unsynced)
        )
        seen = []
        for point in [*watch.points, *watch.unsynced, *over.points, *over.unsynced]:
            if (point.disk, point.returned) in seen:
                continue
            seen.append((point.disk, point.returned))
            crashes.disks += 1
            values, resumed_from = self._recover(point.disk)
            if torch.equal(values, expected) and max(0, point.returned) <= resumed_from <= point.most:
                crashes.recovered += 1
            else:
                crashes.wrong.append(f"{point.where}: resumed from {resumed_from} after {point.returned}")
        return crashes

    def _recover(self, disk: Disk) -> tuple[torch.Tensor, int]:
        folder = self._root / "crashed"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, data in disk.items():
            path = folder / name
            path.mkdir() if data is None else path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a crash leaves nothing that a reader takes for damage
            values, fit = self._fit(folder)
        assert CheckpointDirectory(LocalStore(folder), identity={}).rounds()[-1] == fit.num_rounds
        return values, fit.resumed_from

    def _fit(
        self,
        folder: Path | None,
        *,
        stop_after: int | None = None,
        resume: bool = True,
        saved: Callable[[int], None] = lambda _number: None,
    ):
        torch.manual_seed(3)
        program = Program(
            model=nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.3), nn.Linear(3, 1)),
            loss=nn.MSELoss(),
            optimizer=partial(AdamW, lr=0.01),
        )
        checkpoints = None
        if folder is not None:
            checkpoints = CheckpointDirectory(LocalStore(folder), identity={}, keep=2)
            save = checkpoints.save

            def noted(number, files, state):
                save(number, files, state)
                saved(number)

            checkpoints.save = noted
        coordinator = local_coordinator()
        try:
            fit = make_fit_on(
                self._root,
                program,
                self._shards,
                self._schema,
                coordinator=coordinator,
                checkpoints=checkpoints,
                resume=resume,
                replica_state="durable",
                checkpoint_every=1,
                epochs=1,
                batch_size=4,
                sync_every=1,
                outer_optimizer=partial(SGD, lr=0.7, momentum=0.9, nesterov=True),
                **self._lossy,
            )
            rounds = fit.rounds()
            for record in rounds:
                if record.round == stop_after:
                    break
            rounds.close()
            fit.load_result()
            return flat(program.model), fit
        finally:
            coordinator.close()
