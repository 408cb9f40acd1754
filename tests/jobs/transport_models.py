"""A network that gets into trouble where a test arms it: importable on executors, on either kind of session."""

from __future__ import annotations

import math
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sparkdeep import TorchEstimator


class Armed(nn.Module):
    """Dropout and batch norm; the first replica that finds `armed` removes it and gets into trouble."""

    def __init__(self, armed="", trouble=""):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.armed, self.trouble = str(armed), trouble

    def forward(self, x):
        if self.training and self.armed:
            try:
                Path(self.armed).unlink()
            except FileNotFoundError:
                return self.layers(x)
            return self.act(x)
        return self.layers(x)

    def act(self, x):
        if self.trouble == "raise":
            raise LookupError("the trap was armed")
        if self.trouble == "nan":
            return self.layers(x) * math.nan
        if self.trouble == "print":
            print("the trap was armed")
        if self.trouble == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "hang":
            time.sleep(600)
        return self.layers(x)


class Wide(nn.Module):
    """As many parameters as asked for, in float32."""

    def __init__(self, megabytes):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(int(megabytes * 1e6 / 4)))
        self.layer = nn.Linear(8, 3)

    def forward(self, x):
        return self.layer(x) + self.weight[:3]


def estimator(**options):
    settings = {
        "model": Armed,
        "loss": nn.CrossEntropyLoss(),
        "optimizer": partial(torch.optim.AdamW, lr=0.01),
        "feature_cols": "pixels",
        "label_cols": "label",
        "num_workers": 2,
        "batch_size": 16,
        "epochs": 1,
        "sync_every": 3,
        "seed": 0,
        "progress": False,
        "retry_backoff_s": 0.01,
        "transport": "spark",
        **options,
    }
    return TorchEstimator(**settings)


def blob_rows(count, *, seed=0):
    """(id, pixels, label): three separable classes of 8 numbers."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(7).normal(size=(3, 8)) * 2
    labels = rng.integers(0, 3, count)
    points = centers[labels] + rng.normal(size=(count, 8)) * 0.5
    return [(i, p.tolist(), int(c)) for i, (p, c) in enumerate(zip(points, labels, strict=True))]


def arms(path):
    """A callback that arms the trap after the first round."""

    def after(record):
        if record.round == 1:
            Path(path).write_text("armed")

    return after


def same_bits(first, second):
    one, other = first.model.state_dict(), second.model.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
