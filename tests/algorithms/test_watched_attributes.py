"""State in attributes, closures and containers, which nothing carries, is refused by name before round 2."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from twin import deal, run, schema_of

from sparkdeep.errors import ConfigError
from sparkdeep.models.program import Program

X = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
Y = X[:, :1].copy()


def fit(tmp_path, model, *, loss=None, step=None, preprocess=None, buffers=None, rounds=None, **options):
    program = Program(
        model=model,
        loss=None if step else loss or nn.MSELoss(),
        training_step=step,
        preprocess=preprocess,
        optimizer=partial(torch.optim.SGD, lr=0.01),
        buffers=buffers,
    )
    given = {"batch_size": 8, "epochs": 2, "sync_every": 2, **options}
    return run(tmp_path, program, deal(X, Y, [16, 16]), schema_of(X, Y), **given)


class Net(nn.Module):
    """Changes one attribute in training, as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.net, self.how = nn.Linear(4, 1), how
        self.n, self.rate, self.on, self.late = 0, 1.0, True, None
        self.table, self.stats, self.log, self.array = torch.zeros(3), {"n": 0, "mean": torch.zeros(1)}, [], np.zeros(2)

    def forward(self, x):
        if self.training:
            getattr(self, f"change_{self.how}")(x.detach())
        return self.net(x)

    def change_n(self, x):
        self.n += 1

    def change_rate(self, x):
        self.rate *= 0.9

    def change_on(self, x):
        self.on = False

    def change_late(self, x):
        self.late = x.mean(0)

    def change_table(self, x):
        self.table[0] += 1

    def change_stats(self, x):
        self.stats["mean"] = x.mean().reshape(1)

    def change_log(self, x):
        self.log.append(float(x.mean()))

    def change_array(self, x):
        self.array += 1

    def change_nothing(self, x):
        pass


KINDS = ["n", "rate", "on", "late", "table", "stats", "log", "array"]


@pytest.mark.parametrize("how", KINDS)
def test_an_attribute_that_changes_is_refused_by_name(tmp_path, how):
    with pytest.raises(
        ConfigError, match=rf"training changes '1\.{how}' \(replica 0, round 1\).*buffers=\{{'1\.{how}': .*'local'"
    ):
        fit(tmp_path, nn.Sequential(nn.Identity(), Net(how)))


def test_attributes_that_stay_are_no_reason(tmp_path):
    _, records, _ = fit(tmp_path, Net("nothing"))
    assert len(records) == 2


@pytest.mark.parametrize("how", KINDS)
def test_one_that_is_declared_local_is_let_be(tmp_path, how):
    _, records, _ = fit(tmp_path, Net(how), buffers={how: "local"})
    assert len(records) == 2


class Late(nn.Module):
    """Begins to count in its third round."""

    def __init__(self):
        super().__init__()
        self.net, self.n = nn.Linear(4, 1), 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.steps += 1
            self.n += int(self.steps > 3)
        return self.net(x)


def test_one_that_changes_later_is_refused_when_it_does(tmp_path):
    with pytest.raises(ConfigError, match=r"training changes 'n' \(replica 0, round 4\)"):
        fit(tmp_path, Late(), buffers={"steps": "max"}, epochs=8, sync_every=1)


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, output, label):
        self.calls += 1
        return (output - label).square().mean()


class Step:
    def __init__(self):
        self.calls, self.inner = 0, {"last": 0.0}

    def __call__(self, model, batch):
        self.calls += 1
        self.inner["last"] = math.pi * self.calls
        return (model(batch.features) - batch.labels).square().mean()


def counting_step():
    calls, seen = 0, [0]

    def step(model, batch):
        nonlocal calls
        calls += 1
        seen[0] += 1
        return (model(batch.features) - batch.labels).square().mean()

    return step


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ({"loss": Loss()}, r"'loss:calls'"),
        ({"step": Step()}, r"'training_step\.calls', 'training_step\.inner'"),
        ({"step": counting_step()}, r"'training_step\.calls', 'training_step\.seen'"),
        ({"preprocess": nn.Sequential(Net("n").requires_grad_(False))}, r"'preprocess:0\.n'"),
    ],
    ids=["module", "object", "closure", "preprocess"],
)
def test_those_of_the_users_callables_too(tmp_path, parts, names):
    model = nn.Linear(1, 1) if "preprocess" in parts else nn.Linear(4, 1)
    with pytest.raises(ConfigError, match=f"training changes {names} "):
        fit(tmp_path, model, **parts)


def test_what_torchs_own_modules_compute_anew_is_no_state(tmp_path):
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(
            nn.utils.weight_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 1)
        )
    _, records, _ = fit(tmp_path, model)
    assert len(records) == 2
