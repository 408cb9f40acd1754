"""Optimizers with two sets of parameters (schedule-free): rounds exchange and give back the averages, and train at the others."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from plain_loop import epoch_batches
from torch import nn
from twin import deal, flat, run, schema_of

from sparkdeep.errors import ConfigError
from sparkdeep.models.program import Program
from sparkdeep.optim.asynchronous import Asynchronous

DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(64, 4))
Y = (X @ np.arange(1, 5) / 4 + 0.1 * DRAW.normal(size=64))[:, None]


class FreeSGD(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al., 2024): `z -= lr g(y)`, `x = (1 - 1/t) x + z/t`, `y = (1 - beta) z + beta x`."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    def _move(self, group, weight, mode):
        if group["train_mode"] != mode:
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.data.lerp_(self.state[p]["z"], weight)
            group["train_mode"] = mode

    def eval(self):
        for group in self.param_groups:
            self._move(group, 1 - 1 / group["beta"], False)

    def train(self):
        for group in self.param_groups:
            self._move(group, 1 - group["beta"], True)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"], "a step is taken at y"
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                x = p.lerp(z, 1 - 1 / group["beta"])
                z.add_(p.grad, alpha=-group["lr"])
                x.lerp_(z, 1 / group["k"])
                p.copy_(x.lerp(z, 1 - group["beta"]))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def fit(tmp_path, sizes, optimizer=FreeSGD, **settings):
    program = Program(model=net(), loss=nn.MSELoss(), optimizer=optimizer)
    options = {"batch_size": 8, "epochs": 3, "sync_every": 2, **settings}
    return run(tmp_path, program, deal(X, Y, sizes), schema_of(X, Y), **options)


def plainly(digest, every, *, fresh=False, mode=True):
    """A plain loop that scores its model after every so many steps."""
    model = net()
    optimizer, steps = FreeSGD(model.parameters()), 0
    for epoch in range(3):
        for rows in epoch_batches(64, 8, digest=digest, epoch=epoch):
            if steps % every == 0:
                optimizer = FreeSGD(model.parameters()) if fresh else optimizer
                optimizer.train()
            optimizer.zero_grad()
            nn.functional.mse_loss(model(torch.from_numpy(X[rows])), torch.from_numpy(Y[rows])).backward()
            optimizer.step()
            steps += 1
            if steps % every == 0 and mode:
                optimizer.eval()
    return flat(model)


@pytest.mark.parametrize("stages", [1, 100])
def test_one_replica_is_a_plain_loop_that_calls_train_and_eval(tmp_path, stages):
    model, _, own = fit(tmp_path, [64], rounds_per_stage=stages)
    digest = own.shards[0].digest
    assert torch.equal(flat(model), plainly(digest, 2))
    assert float((flat(model) - plainly(digest, 24, mode=False)).abs().max()) > 1e-3, "y is not x"


def test_reset_is_a_fresh_optimizer(tmp_path):
    model, _, own = fit(tmp_path, [64], inner_state="reset")
    assert torch.equal(flat(model), plainly(own.shards[0].digest, 2, fresh=True))


def test_what_is_averaged_is_what_scores(tmp_path):
    """One step: x = z = start - lr g(start), whose mean over replicas is a step on all rows."""
    model, records, _ = fit(tmp_path, [32, 32], batch_size=32, epochs=1, sync_every=1)
    own = net()
    nn.functional.mse_loss(own(torch.from_numpy(X)), torch.from_numpy(Y)).backward()
    torch.optim.SGD(own.parameters(), lr=0.1).step()
    torch.testing.assert_close(flat(model), flat(own), rtol=0, atol=1e-12)
    assert len(records) == 1


def test_where_it_cannot_be_meant_it_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"outer_optimizer=FreeSGD takes gradients at other parameters"):
        fit(tmp_path, [64], optimizer=partial(torch.optim.SGD, lr=0.1), outer_optimizer=FreeSGD)
    outer = partial(torch.optim.SGD, lr=1.0)
    with pytest.raises(ConfigError, match=r"asynchronous= with the optimizer FreeSGD"):
        fit(tmp_path, [64], outer_optimizer=outer, asynchronous=Asynchronous(1, 1), sync_every="epoch")
