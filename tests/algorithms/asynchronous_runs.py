"""What the tests of asynchronous rounds train: a small net on random rows, on threads."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, AdamW
from twin import deal, flat, run, schema_of

from sparkdeep import seams
from sparkdeep.models.program import Program

RNG = np.random.default_rng(7)
X, Y = RNG.normal(size=(96, 3)), RNG.normal(size=(96, 1))
SCHEMA = schema_of(X, Y)
SIZES = [24, 16, 8]
RATE, BATCH, EPOCHS = 0.05, 4, 2
EXACT = {"rtol": 1e-13, "atol": 1e-13}


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def program(optimizer=None, model=None, **parts):
    return Program(model=model or net(), loss=nn.MSELoss(), optimizer=optimizer or partial(SGD, lr=RATE), **parts)


def options_of(asynchronous, outer, sizes=SIZES, **options):
    whole = {"epochs": EPOCHS, "batch_size": BATCH, "sync_every": "epoch", "max_retries": 0, **options}
    return whole | {"asynchronous": asynchronous, "outer_optimizer": outer}


def train(tmp_path, asynchronous, outer, sizes=SIZES, *, own=None, **options):
    count = sum(sizes)
    made = own or program()
    _, records, fit = run(
        tmp_path, made, deal(X[:count], Y[:count], sizes), SCHEMA, **options_of(asynchronous, outer, **options)
    )
    return flat(made.model), records, fit


def dropping():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.4), nn.Linear(6, 1)).double()
    return program(partial(AdamW, lr=0.02), model)


class Slow:
    """A seam at which one replica waits before it comes in; outside of the lock that replicas of one process share."""

    def __init__(self, replica, seconds):
        self.replica, self.seconds = replica, seconds

    def reached(self, phase, round_number, replica):
        if phase == "transfer" and replica == self.replica:
            time.sleep(self.seconds)

    def passing(self, phase, round_number, replica, data):
        return data

    def __enter__(self):
        seams.install(self)

    def __exit__(self, *_):
        seams.install(None)
