"""The leak oracle: what of ours is there at this moment, and that ten seconds after a fit none of it is."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from pathlib import Path

from sparkdeep.data.scratch import Owner, is_dead

_TCP_LISTENS = "0A"


class Leaks:
    """Compares what there is with what there was when it was made.

    Args:
        session: Spark's, of this process.
        folders: below which executors keep shards and states; processes with one of them in SPARK_LOCAL_DIRS are ours.
    """

    def __init__(self, session, folders):
        self.session = session
        self.folders = [Path(folder) for folder in folders]
        self.before = {}
        self.before = self.settled()

    def look(self):
        """Everything that a fit must have let go of, by kind; lists, empty where there is nothing."""
        context = self.session.sparkContext
        java = context._jsc.sc()
        living, _ = self._run_folders()
        return {
            "jobs": sorted(context.statusTracker().getActiveJobsIds()),
            "tags": sorted(context.getJobTags()),
            "properties": _properties(context),
            "persisted": sorted({info.id() for info in java.getRDDStorageInfo()} | _keys(java.getPersistentRDDs())),
            "folders": living,
            "processes": self.processes(),
            "sockets": own_sockets(),
            "threads": sorted(t.name for t in threading.enumerate() if t.name.startswith("sparkdeep")),
            "temporary": sorted(os.listdir(tempfile.gettempdir())),
        }

    def settled(self):
        """What there is once nothing runs."""
        deadline = time.monotonic() + 40
        while (seen := self.look())["jobs"] and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not seen["jobs"], seen
        return seen

    def check(self, within_s=40.0):
        """Poll until nothing is left.

        Raises:
            AssertionError: naming what is, `within_s` later.
        """
        deadline = time.monotonic() + within_s
        while left := self.left():
            assert time.monotonic() < deadline, f"left behind {within_s:g} s after: {left}"
            time.sleep(0.2)

    def left(self):
        """What there is now and was not before, by kind."""
        now = self.look()
        more = {kind: [one for one in seen if one not in self.before[kind]] for kind, seen in now.items()}
        return {kind: seen for kind, seen in more.items() if seen}

    def of_the_dead(self):
        """Folders that killed executors left: the next fit on their host sweeps them."""
        return self._run_folders()[1]

    def _run_folders(self):
        living, dead = [], []
        for folder in self.folders:
            for path in folder.rglob("sparkdeep-*"):
                try:
                    owner = Owner.from_json(json.loads((path / "owner.json").read_text()))
                except FileNotFoundError:
                    living.append(str(path))
                    continue
                (dead if is_dead(owner) else living).append(str(path))
        return sorted(living), sorted(dead)

    def processes(self):
        """Python workers at a run: not idle as between tasks, or without an executor."""
        return at_a_run(self.folders)


def at_a_run(folders):
    """Python processes of executors with these local directories that hold a shard, are stopped, or have no executor."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
            if "pyspark" not in command and "sparkdeep" not in command:
                continue
            if not any(str(folder).encode() in _local_dirs(entry) for folder in folders):
                continue
            if reason := _reason(entry, command):
                found.append(f"{entry.name}: {reason}: {command[-80:]}")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while it was looked at
    return sorted(found)


def _local_dirs(entry):
    variables = (entry / "environ").read_bytes().split(b"\0")
    return next((value for value in variables if value.startswith(b"SPARK_LOCAL_DIRS=")), b"")


def _reason(entry, command):
    if "org.apache.spark" in command:
        return ""
    state = (entry / "stat").read_text().rpartition(")")[2].split()
    if state[0] in "ZX":
        return ""
    if state[0] == "T":
        return "stopped"
    if "sparkdeep.spark.tasks.child" in command:
        return "a replica's child process"
    if _has_files(entry):
        return "holds files of a run"
    return "" if _has_executor(int(state[1])) else "has no executor"


def _has_files(entry):
    if "/sparkdeep-" in (entry / "maps").read_text():
        return True
    for link in (entry / "fd").iterdir():
        try:
            if "/sparkdeep-" in os.readlink(link):
                return True
        except FileNotFoundError:
            continue  # closed while it was looked at
    return False


def _has_executor(pid):
    while pid > 1:
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        if text.partition("(")[2].startswith("java)"):
            return True
        pid = int(text.rpartition(")")[2].split()[1])
    return False


def own_sockets():
    """This process's listening ports, and its ends of the coordinator's Unix socket."""
    inodes = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:
            continue  # the folder's own descriptor
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            values = line.split()
            if values[3] == _TCP_LISTENS and values[9] in inodes:
                found.append(f"port {int(values[1].rpartition(':')[2], 16)}")
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        values = line.split()
        if len(values) > 7 and values[7].startswith("@sparkdeep-") and values[6] in inodes:
            found.append(values[7])
    return sorted(found)


def _properties(context):
    names = ("spark.jobGroup.id", "spark.job.description", "spark.job.interruptOnCancel", "spark.scheduler.pool")
    values = {name: context.getLocalProperty(name) for name in names}
    return [f"{name}={value}" for name, value in values.items() if value is not None]


def _keys(java_map):
    iterator = java_map.keysIterator()
    found = set()
    while iterator.hasNext():
        found.add(int(iterator.next()))
    return found
