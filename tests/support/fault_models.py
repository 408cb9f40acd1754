"""What is trained under faults, and what strikes there: importable on executors through PYTHONPATH."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sparkdeep import TorchEstimator
from sparkdeep.data.scratch import owner_of_this_process

ROWS = 1000


class Wide(nn.Module):
    """Half a megabyte of parameters, with dropout and batch norm inside: random streams and buffers matter."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(20, 4096), nn.BatchNorm1d(4096), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4096, 3)
        )

    def forward(self, x):
        return self.layers(x)


def rows(session, count=ROWS):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 20, generator=generator)
    y = (x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    data = [(a.tolist(), int(b)) for a, b in zip(x, y, strict=True)]
    return session.createDataFrame(data, "x array<double>, y long")


def estimator(injector=None, **options):
    """Eight rounds of two replicas, every one durable; an injector comes along as `preprocess`."""
    settings = {
        "model": Wide,
        "loss": nn.CrossEntropyLoss(),
        "optimizer": partial(torch.optim.AdamW, lr=1e-3),
        "feature_cols": ["x"],
        "label_cols": "y",
        "num_workers": 2,
        "batch_size": 32,
        "epochs": 2,
        "sync_every": 4,
        "seed": 1,
        "progress": False,
        "retry_backoff_s": 0.2,
        "replica_state": "durable",
        "checkpoint_every": 1,
        "aggregation": "star",
    }
    if injector is not None:
        settings["preprocess"] = injector.carrier()
    return TorchEstimator(**{**settings, **options})


def segfault():
    ctypes.string_at(0)


class Tell:
    """Leaves this process's number in `<folder>/<name>`."""

    def __init__(self, folder, name):
        self.path = Path(folder) / name

    def __call__(self):
        part = self.path.with_suffix(".part")
        part.write_text(str(os.getpid()))
        part.rename(self.path)


class Stop(Tell):
    """Stops its own process, as one that hangs where no signal handler runs."""

    def __call__(self):
        super().__call__()
        os.kill(os.getpid(), signal.SIGSTOP)


class Linger(Tell):
    """Waits for `seconds`, and tells that it woke: a zombie that goes on when nobody waits for it any more."""

    def __init__(self, folder, name, seconds):
        super().__init__(folder, name)
        self.seconds = seconds

    def __call__(self):
        time.sleep(self.seconds)
        super().__call__()


class Signal:
    """Sends a signal to the process whose number lies in a file."""

    def __init__(self, pid_file, signum):
        self.pid_file = str(pid_file)
        self.signum = int(signum)

    def __call__(self):
        pid = int(Path(self.pid_file).read_text())
        assert pid > 1
        os.kill(pid, self.signum)
        time.sleep(0.2)  # what comes next in this replica is not to be faster than the signal


class LoseExecutor:
    """The executor that this replica runs on dies with its disk, and the replica with it."""

    def __call__(self):
        pid = owner_of_this_process().pid
        assert pid is not None
        assert pid > 1
        assert pid != os.getpid(), "an executor's JVM is an ancestor of its workers"
        folders = os.environ["SPARK_LOCAL_DIRS"].split(",")
        os.kill(pid, signal.SIGKILL)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGKILL)


class KillParent(Tell):
    """SIGKILL for the daemon that forked this worker; the worker lives on."""

    def __call__(self):
        super().__call__()
        pid = os.getppid()
        assert pid > 1
        assert b"daemon" in Path(f"/proc/{pid}/cmdline").read_bytes()
        os.kill(pid, signal.SIGKILL)


class SlowHost:
    """Every batch takes a while on one host."""

    def __init__(self, host, seconds):
        self.host = host
        self.seconds = seconds

    def __call__(self, x):
        if self.host in os.environ.get("SPARK_LOCAL_DIRS", ""):
            time.sleep(self.seconds)
        return x
