"""Outer steps and aggregators against optax and Flower, where they mean the same; they run in a Python of their own."""

from __future__ import annotations

import json
import os
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad

from sparkdeep.optim.outer import Assign, FedAdam, FedYogi, TorchOuter
from sparkdeep.tensors.parameters import Layout

pytestmark = pytest.mark.extras

HERE = Path(__file__).resolve().parent
PYTHON = HERE.parents[1] / ".venv-oracles" / "bin" / "python"
SIZE, ROUNDS = 6, 9


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(11)
    rows = [3, 5, 2]
    spread = rng.normal(size=(3, SIZE))
    spread -= np.average(spread, axis=0, weights=rows)  # the mean by rows is the round's mean
    return {
        "start": rng.normal(size=SIZE).tolist(),
        "targets": rng.normal(size=(ROUNDS, SIZE)).tolist(),
        "share": 0.3,
        "rows": rows,
        "spread": spread.tolist(),
        "vectors": rng.normal(size=(7, SIZE)).tolist(),
    }


@pytest.fixture(scope="module")
def foreign(given):
    asked = subprocess.run(
        [str(PYTHON), str(HERE / "foreign_algorithms.py")], input=json.dumps(given), capture_output=True, text=True, timeout=300,
        check=False, env={**os.environ, "PYTHONPATH": "", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr[-2000:]
    return json.loads(asked.stdout.splitlines()[-1])


class Point(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(start, dtype=torch.float64))


def ours(given, factory):
    module = Point(given["start"])
    layout = Layout.of(module)
    x = layout.read(module, layout.empty())
    outer = Assign() if factory is None else TorchOuter(factory, x, layout)
    for target in torch.tensor(given["targets"], dtype=torch.float64):
        mean = x.detach() + given["share"] * (target - x.detach())
        outer.step(x, lambda mean=mean: SimpleNamespace(mean=mean, loss=0.0))
    return x.detach().numpy()


@pytest.mark.identity(18)
@pytest.mark.parametrize(
    ("name", "factory", "other"),
    [
        ("nesterov", partial(SGD, lr=0.7, momentum=0.9, nesterov=True), partial(SGD, lr=0.7, momentum=0.9)),
        ("momentum", partial(SGD, lr=1.0, momentum=0.8), None),
        ("fedavg", None, partial(SGD, lr=0.5)),
        ("fedyogi", partial(FedYogi, lr=0.05, tau=1e-6), partial(FedAdam, lr=0.05, tau=1e-6)),
        ("fedadagrad", partial(Adagrad, lr=0.05, eps=1e-6), partial(Adagrad, lr=0.06, eps=1e-6)),
    ],
)
def test_outer_steps_are_those_of_optax_and_flower(given, foreign, name, factory, other):
    # FedYogi's second moment begins at tau squared, Flower's at 0.
    np.testing.assert_allclose(ours(given, factory), foreign[name], rtol=0, atol=1e-9 if name == "fedyogi" else 1e-12)
    assert np.abs(ours(given, other) - foreign[name]).max() > 1e-4


@pytest.mark.identity(18)
def test_lookahead_is_optaxs(given, foreign):
    module = Point(given["start"])
    layout = Layout.of(module)
    x = layout.read(module, layout.empty())
    outer = TorchOuter(partial(SGD, lr=0.5), x, layout)
    targets = torch.tensor(given["targets"], dtype=torch.float64)
    for first in range(0, ROUNDS, 3):
        fast = x.detach().clone()
        for target in targets[first : first + 3]:
            fast += given["share"] * (target - fast)
        outer.step(x, lambda fast=fast: SimpleNamespace(mean=fast, loss=0.0))
    np.testing.assert_allclose(x.detach().numpy(), foreign["lookahead"], rtol=0, atol=1e-12)
