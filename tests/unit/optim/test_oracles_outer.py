"""The outer step held to recurrences written out; its sign to an identity."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from twin import deal, flat, run, schema_of

from sparkdeep.errors import ConfigError
from sparkdeep.models.program import Program
from sparkdeep.optim.outer import Assign, TorchOuter
from sparkdeep.tensors.parameters import Layout


def mean_of(vector):
    return SimpleNamespace(mean=vector, loss=1.5)


def module():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()


class Rounds:
    """Local work that is known in closed form: every round moves the parameters 30 % of the way to a target."""

    def __init__(self, numel):
        self.target = torch.linspace(-1, 1, numel, dtype=torch.float64)

    def __call__(self, parameters):
        return parameters + 0.3 * (self.target - parameters)


def drive(factory, steps=12):
    layout = Layout.of(module())
    parameters = layout.read(module(), layout.empty())
    rounds = Rounds(layout.numel)
    outer = TorchOuter(factory, parameters, layout)
    for _ in range(steps):
        start = parameters.detach().clone()
        outer.step(parameters, lambda start=start: mean_of(rounds(start)))
    return parameters.detach(), rounds, layout.read(module(), layout.empty())


@pytest.mark.identity(5)
def test_outer_sgd_of_rate_one_is_assignment():
    moved, rounds, expected = drive(partial(torch.optim.SGD, lr=1.0))
    for _ in range(12):
        expected = rounds(expected)
    torch.testing.assert_close(moved, expected, rtol=1e-14, atol=1e-15)
    assert (moved - rounds.target).abs().max() < 0.05, "the outer step moves towards the mean, not away from it"


def test_assignment_writes_the_mean_to_the_last_bit():
    parameters = torch.zeros(3)
    mean = torch.tensor([0.1, 1e-30, 3.0], dtype=torch.float64)
    Assign().step(parameters, lambda: mean_of(mean))
    assert torch.equal(parameters, mean.float())


@pytest.mark.identity(9)
def test_nesterov_momentum_is_the_recurrence_of_diloco():
    moved, rounds, expected = drive(partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True))
    velocity = torch.zeros_like(expected)
    without_nesterov, plain_velocity = expected.clone(), velocity.clone()
    for _ in range(12):
        gradient = expected - rounds(expected)
        velocity = 0.9 * velocity + gradient
        expected = expected - 0.7 * (gradient + 0.9 * velocity)
        plain_velocity = 0.9 * plain_velocity + (without_nesterov - rounds(without_nesterov))
        without_nesterov = without_nesterov - 0.7 * plain_velocity
    torch.testing.assert_close(moved, expected, rtol=1e-14, atol=1e-14)
    assert (moved - without_nesterov).abs().max() > 1e-3


@pytest.mark.identity(9)
def test_adam_is_the_recurrence_of_fedadam():
    moved, rounds, expected = drive(partial(torch.optim.Adam, lr=0.05, betas=(0.9, 0.99), eps=1e-3))
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for t in range(1, 13):
        gradient = expected - rounds(expected)
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient.square()
        step = (first / (1 - 0.9**t)) / ((second / (1 - 0.99**t)).sqrt() + 1e-3)
        expected = expected - 0.05 * step
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-13)


def test_the_outer_optimizer_sees_each_parameter_in_its_shape():
    seen = []

    class Shapes(torch.optim.SGD):
        def step(self, closure=None):
            loss = closure()
            seen.append([tuple(p.shape) for g in self.param_groups for p in g["params"]])
            assert all(p.grad.shape == p.shape for g in self.param_groups for p in g["params"])
            return super().step(lambda: loss)

    drive(partial(Shapes, lr=1.0), steps=2)
    assert seen == [[(4, 3), (4,), (2, 4), (2,)]] * 2


def test_a_round_that_fails_moves_neither_parameters_nor_state():
    layout = Layout.of(module())
    parameters = layout.read(module(), layout.empty())
    outer = TorchOuter(partial(torch.optim.Adam, lr=0.1), parameters, layout)
    outer.step(parameters, lambda: mean_of(parameters.detach() * 0.5))
    before, state = parameters.detach().clone(), copy.deepcopy(outer.state_dict())

    def fail():
        raise RuntimeError("a replica was lost")

    with pytest.raises(RuntimeError, match="lost"):
        outer.step(parameters, fail)
    assert torch.equal(parameters, before)
    for i, own in state["state"].items():
        assert all(torch.equal(value, outer.state_dict()["state"][i][name]) for name, value in own.items())


def test_an_outer_optimizer_that_is_none_is_refused_with_a_remedy():
    layout = Layout.of(module())
    with pytest.raises(ConfigError, match=r"outer_optimizer returned int.*partial\(torch.optim.SGD"):
        TorchOuter(lambda parameters: 3, layout.empty(), layout)


def test_assignment_refuses_state_of_another_outer_optimizer():
    with pytest.raises(ValueError, match="momentum"):
        Assign().load_state_dict({"momentum": 1})


# -- in a whole fit --------------------------------------------------------------------------------------------------


def fit(tmp_path, outer):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 3))
    y = rng.normal(size=(30, 2))
    program = Program(model=module(), loss=nn.MSELoss(), optimizer=partial(torch.optim.SGD, lr=0.1))
    options = {"epochs": 4, "batch_size": 5, "sync_every": 2, "outer_optimizer": outer}
    return flat(run(tmp_path, program, deal(x, y, [18, 12]), schema_of(x, y), **options)[0])


def test_a_fit_with_outer_sgd_of_rate_one_equals_plain_averaging_within_rounding(tmp_path):
    averaged = fit(tmp_path, None)
    torch.testing.assert_close(fit(tmp_path, partial(torch.optim.SGD, lr=1.0)), averaged, rtol=1e-13, atol=1e-14)
    start = flat(module())
    half = fit(tmp_path, partial(torch.optim.SGD, lr=0.5))
    away = fit(tmp_path, partial(torch.optim.SGD, lr=1.0, maximize=True))
    assert 0 < (half - start).norm() < (averaged - start).norm()
    assert torch.dot(away - start, averaged - start) < 0
