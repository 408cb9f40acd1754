"""Runs `fault_driver.py` in a process of its own, and knows what became of it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from cluster_fixtures import HOSTS, environment, wait_for
from leaks import at_a_run

_SCRIPT = Path(__file__).with_name("fault_driver.py")


class ChildDriver:
    """A driver on `cluster`, or with `master="local[2]"` on its own; at work as soon as it is made."""

    def __init__(self, cluster, folder, injector=None, *, master="", stop_at=0, interrupts=(), **options):
        self.cluster = cluster
        self.folder = Path(folder)
        self.folder.mkdir(exist_ok=True)
        job = {"url": master or cluster.url, "root": str(cluster.root), "options": options}
        job.update(stop_at=stop_at, interrupts=list(interrupts))
        job["conf"] = {"spark.local.dir": str(self.folder / "local")}  # a driver's own; executors have their worker's
        (self.folder / "job.json").write_text(json.dumps(job))
        if injector is not None:
            (self.folder / "plan.pkl").write_bytes(pickle.dumps(injector))
        self._log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, str(_SCRIPT), str(self.folder)],
            env=environment(SPARK_LOCAL_IP="127.0.0.1"),
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert self.process.pid > 1
        if self.process.poll() is None or self.in_group():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=15)
        self._log.close()

    def in_group(self):
        """Whether a process of this driver (its JVM) is left."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait(self, timeout_s=150):
        """Its exit status."""
        try:
            return self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver did not end in {timeout_s} s:\n{self.log()}") from None

    def log(self):
        return (self.folder / "log").read_text(errors="replace")[-6000:]

    def rounds(self):
        path = self.folder / "rounds"
        return path.read_text().splitlines() if path.exists() else []

    def changes(self):
        """Of the number of replicas, such as "5: 2 -> 1"."""
        path = self.folder / "changes"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for_round(self, number, timeout_s=120):
        wait_for(lambda: self.process.poll() is not None or str(number) in self.rounds(), timeout_s, f"round {number}")
        assert self.process.poll() is None, self.log()

    def error(self):
        """(type's name, message) of the error that ended its fit."""
        path = self.folder / "error"
        assert path.exists(), self.log()
        return tuple(json.loads(path.read_text()))

    def weights(self):
        path = self.folder / "weights.pt"
        assert path.exists(), self.log()
        return torch.load(path, weights_only=True)

    def check_gone(self, within_s=10.0):
        """Its JVM, its executors and their workers are gone."""
        application = (self.folder / "session").read_text()
        folders = [self.folder / "local", *(self.cluster.local_dir(host) for host in HOSTS)]
        deadline = time.monotonic() + within_s
        while left := self._left(application, folders):
            assert time.monotonic() < deadline, f"{within_s:g} s after the driver's end: {left}"
            time.sleep(0.2)

    def _left(self, application, folders):
        executors = [host for host in HOSTS if self.cluster.executor_pid(host, application)]
        jvm = ["the driver's JVM"] if self.in_group() else []
        return [*jvm, *executors, *at_a_run(folders)]
