"""Networks, rows and an estimator with short settings: importable on executors through PYTHONPATH."""

from __future__ import annotations

import os
import threading
import time
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from sparkdeep import TorchEstimator
from sparkdeep.spark.ingest.tasks import FLAG, numbered


class Net(nn.Module):
    """8 inputs, 3 classes."""

    def __init__(self, width=16):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x):
        return self.layers(x)


class Dropped(nn.Module):
    """Dropout and batch norm: its result depends on random streams and on buffers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


WITH_STATE = {
    "model": Dropped,
    "optimizer": partial(torch.optim.AdamW, lr=1e-2),
    "epochs": 2,
    "sync_every": 3,
}


class Recorder(nn.Module):
    """Named arguments of stated (shape of a row, dtype), refused otherwise; gives the mean of each, a column apiece."""

    def __init__(self, expected):
        super().__init__()
        self.expected = dict(expected)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, **columns):
        got = {name: (tuple(x.shape[1:]), x.dtype) for name, x in columns.items()}
        if got != self.expected:
            raise AssertionError(f"got {got}")
        means = [x.reshape(len(x), -1).float().mean(1) for x in columns.values()]
        return torch.stack(means, 1) * self.scale


def distance_of_means(output, label):
    return ((output.mean(1) - label) ** 2).mean()


class TwoTowers(nn.Module):
    """Named arguments, with an embedding over an integer column."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(6, 1)

    def forward(self, dense, category):
        assert category.dtype == torch.int64
        return self.head(torch.cat([dense, self.embedding(category)], 1))


class Locked(Net):
    """Holds what cannot be pickled."""

    def __init__(self):
        super().__init__()
        self.guard = threading.Lock()


class Chatty(Net):
    """Prints from the executor, once."""

    def __init__(self):
        super().__init__()
        self.said = False

    def forward(self, x):
        if self.training and not self.said:
            self.said = True
            print(f"hello from process {os.getpid()}")
        return super().forward(x)


class ChattyDropped(Dropped):
    """Prints from the executor, once, and has the parameters of `Dropped`."""

    def __init__(self):
        super().__init__()
        self.said = False

    def forward(self, x):
        if self.training and not self.said:
            self.said = True
            print(f"hello from process {os.getpid()}")
        return super().forward(x)


class Trap(Net):
    """Raises when a row carries a certain mark, which the first rows do not."""

    def __init__(self, mark):
        super().__init__()
        self.mark = mark

    def forward(self, x):
        if self.training and (x[:, 0] == self.mark).any():
            raise RuntimeError(f"the mark {self.mark} came up")
        return super().forward(x)


class Affine(nn.Module):
    """One output a row from k numbers."""

    def __init__(self, inputs=1, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(inputs, 1, dtype=dtype)

    def forward(self, x):
        return self.linear(x)


class LabelCount(nn.Module):
    """Learns nothing; its loss is the mean label."""

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.nothing.expand(len(x))


def label_share(output, label):
    return label.float().mean() + 0 * output.sum()


class CountsBuilds(nn.Module):
    """Writes a line to a file each time it is unpickled, that is, each time a worker builds it."""

    def __init__(self, path):
        super().__init__()
        self.path = str(path)
        self.linear = nn.Linear(8, 3)

    def __setstate__(self, state):
        super().__setstate__(state)
        with open(self.path, "a") as file:
            file.write(f"{os.getpid()}\n")

    def forward(self, x):
        return self.linear(x)


def slowly(x):
    time.sleep(0.05)
    return x


def blob_rows(count, *, seed=0):
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(7).normal(size=(3, 8)) * 2
    labels = rng.integers(0, 3, count)
    points = centers[labels] + rng.normal(size=(count, 8)) * 0.5
    return [(i, p.tolist(), int(c)) for i, (p, c) in enumerate(zip(points, labels, strict=True))]


def emit(parts, batches):
    """Partition i holds the rows of `parts[i]`, in their order."""
    for batch in batches:
        for number in batch.column(0).to_pylist():
            columns = {numbered(i): pa.array(rows) for i, rows in enumerate(parts[number])}
            columns[FLAG] = pa.array([False] * len(parts[number][0]))
            yield pa.RecordBatch.from_pydict(columns)


def estimator(**options):
    """Two replicas, a few rounds; any setting can be replaced."""
    settings = {
        "model": Net,
        "loss": nn.CrossEntropyLoss(),
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "feature_cols": "pixels",
        "label_cols": "label",
        "num_workers": 2,
        "batch_size": 16,
        "epochs": 1,
        "sync_every": 4,
        "seed": 0,
        "progress": False,
        "retry_backoff_s": 0.01,
        **options,
    }
    return TorchEstimator(**settings)


def regression(model, **options):
    """Mean squared error, for models with one output a row."""
    return estimator(
        **{"model": model, "loss": nn.MSELoss(), "optimizer": partial(torch.optim.SGD, lr=1e-3), **options}
    )


def weights(model):
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
