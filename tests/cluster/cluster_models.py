"""What cluster tests train: importable on executors through PYTHONPATH."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sparkdeep import TorchEstimator

HOSTS = ("127.0.0.2", "127.0.0.3")


class Net(nn.Module):
    """Dropout and batch norm inside, so that random streams and buffers matter."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))

    def forward(self, x):
        return self.layers(x)


class Handshake:
    """Touches `<folder>/reached` in the middle of the work of whoever comes there, once a host, and waits for `killed`."""

    def __init__(self, folder, batches):
        self.folder = str(folder)
        self.batches = batches
        self.seen = 0

    def __call__(self, x):
        self.seen += 1
        if self.seen == self.batches:
            try:
                fd = os.open(
                    Path(self.folder) / f"reached-{os.environ['SPARK_LOCAL_DIRS'].count('127.0.0.2')}",
                    os.O_CREAT | os.O_EXCL,
                )
            except FileExistsError:
                return x
            os.close(fd)
            deadline = time.monotonic() + 60
            while not (Path(self.folder) / "killed").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
        return x


class Plain(nn.Module):
    """A function of its parameters and rows alone."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


class Straggler:
    """The first task that comes by sleeps; others, and a second attempt at its work, do not.

    Writes "<portion> <host>" into `<folder>/straggles`.
    """

    def __init__(self, folder, seconds):
        self.folder = str(folder)
        self.seconds = seconds

    def __call__(self, x):
        from pyspark import TaskContext

        context = TaskContext.get()
        if context is None:  # the driver rehearses
            return x
        try:
            fd = os.open(Path(self.folder) / "straggles", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return x
        os.write(fd, f"{context.partitionId()} {os.environ['SPARK_LOCAL_IP']}".encode())
        os.close(fd)
        time.sleep(self.seconds)
        return x


def rows(session, count=2000):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 20, generator=generator)
    y = (x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    data = [(a.tolist(), int(b)) for a, b in zip(x, y, strict=True)]
    return session.createDataFrame(data, "x array<double>, y long")


def estimator(**options):
    settings = {
        "model": Net,
        "loss": nn.CrossEntropyLoss(),
        "optimizer": partial(torch.optim.AdamW, lr=1e-3),
        "feature_cols": ["x"],
        "label_cols": "y",
        "num_workers": 2,
        "batch_size": 32,
        "epochs": 2,
        "sync_every": 8,
        "seed": 1,
        "progress": False,
        "retry_backoff_s": 0.1,
        "buffers": {"*.seen": "local"},  # `Handshake` and its like count batches, to strike in the middle
    }
    return TorchEstimator(**{**settings, **options})


def weights(model):
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
