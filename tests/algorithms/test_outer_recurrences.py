"""Every outer step by name, held to its paper's recurrence written out in numpy; each with a control that differs."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam

from sparkdeep.errors import ConfigError
from sparkdeep.optim.outer import DelayedNesterov, Downpour, FedAdam, FedYogi, SlowMo, TorchOuter
from sparkdeep.tensors.parameters import Layout
from sparkdeep.tensors.state_dicts import pack, unpack_dict

ROUNDS = 12
RATES = [0.1 * 0.7**t for t in range(ROUNDS)]


def targets(numel):
    """The round's mean: part of the way to a target that turns, so that momentum and second moments have work to do."""
    rng = np.random.default_rng(7)
    return [rng.normal(size=numel) for _ in range(ROUNDS)]


def mean_after(x, target):
    return x + 0.3 * (target - x)


def drive(factory, rates=None, rounds=ROUNDS, restored_at=None):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    layout = Layout.of(net)
    parameters = layout.read(net, layout.empty())
    start = parameters.numpy().copy()
    outer = TorchOuter(factory, parameters, layout)
    for t, target in enumerate(targets(layout.numel)[:rounds]):
        if t == restored_at:
            kept = unpack_dict(pack({"outer": dict(outer.state_dict())}))["outer"]
            outer = TorchOuter(factory, parameters, layout)
            outer.load_state_dict(kept)
        outer.inner_lrs = [rates[t] if rates else 1.0] * len(layout.entries)
        mean = torch.from_numpy(mean_after(parameters.detach().numpy(), target))
        outer.step(parameters, lambda mean=mean: SimpleNamespace(mean=mean, loss=1.0))
    return parameters.detach().numpy(), start


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-14)


def differs(got, other):
    assert np.abs(got - other).max() > 1e-3, "the control must fail the same comparison"


# -- block momentum --------------------------------------------------------------------------------------------------


def bmuf(x, rate, momentum, nesterov):
    """Chen and Huo: V = momentum V + rate G; W += V. With Nesterov's, blocks start from W + momentum V."""
    velocity, weights, handed = np.zeros_like(x), x.copy(), x.copy()
    for target in targets(len(x)):
        change = mean_after(handed, target) - handed
        velocity = momentum * velocity + rate * change
        weights = (handed if not nesterov else weights) + velocity
        handed = weights + momentum * velocity if nesterov else weights
    return handed


@pytest.mark.identity(9)
def test_classical_block_momentum_is_sgd_with_momentum():
    got, start = drive(partial(SGD, lr=1.0, momentum=0.8))
    close(got, bmuf(start, 1.0, 0.8, nesterov=False))
    differs(got, bmuf(start, 1.0, 0.7, nesterov=False))


@pytest.mark.identity(9)
def test_nesterov_block_momentum_is_sgd_with_nesterov():
    got, start = drive(partial(SGD, lr=1.0, momentum=0.8, nesterov=True))
    close(got, bmuf(start, 1.0, 0.8, nesterov=True))
    differs(got, bmuf(start, 1.0, 0.8, nesterov=False))


@pytest.mark.identity(9)
def test_no_momentum_and_a_rate_of_one_is_the_mean():
    got, start = drive(partial(SGD, lr=1.0, momentum=0.0))
    expected = start
    for target in targets(len(start)):
        expected = mean_after(expected, target)
    close(got, expected)


@pytest.mark.identity(9)
def test_lookahead_goes_half_the_way():
    got, slow = drive(partial(SGD, lr=0.5))
    for target in targets(len(slow)):
        slow = slow + 0.5 * (mean_after(slow, target) - slow)
    close(got, slow)


@pytest.mark.identity(9)
def test_the_center_of_elastic_averaging_is_sgd_on_the_mean_change():
    workers, alpha = 4, 0.9 / 4
    got, center = drive(partial(SGD, lr=workers * alpha))
    for target in targets(len(center)):
        mean = mean_after(center, target)
        spread = np.random.default_rng(0).normal(size=(workers, len(center)))
        replicas = mean + spread - spread.mean(axis=0)
        center = center + alpha * (replicas - center).sum(axis=0)
    np.testing.assert_allclose(got, center, rtol=1e-12, atol=1e-13)


# -- slow momentum ---------------------------------------------------------------------------------------------------


def slowmo(x, lr, momentum, rates):
    """Wang et al., algorithm 1."""
    slow = np.zeros_like(x)
    for rate, target in zip(rates, targets(len(x)), strict=True):
        slow = momentum * slow + (x - mean_after(x, target)) / rate
        x = x - lr * rate * slow
    return x


@pytest.mark.identity(9)
def test_slow_momentum_with_a_constant_rate_is_sgd_with_momentum():
    rates = [0.1] * ROUNDS
    got, start = drive(partial(SlowMo, lr=0.9, momentum=0.6), rates)
    close(got, slowmo(start, 0.9, 0.6, rates))
    close(got, drive(partial(SGD, lr=0.9, momentum=0.6))[0])


@pytest.mark.identity(9)
def test_slow_momentum_with_a_rate_that_decays_is_its_own_recurrence_and_sgd_is_not():
    got, start = drive(partial(SlowMo, lr=0.9, momentum=0.6), RATES)
    close(got, slowmo(start, 0.9, 0.6, RATES))
    differs(got, drive(partial(SGD, lr=0.9, momentum=0.6))[0])


def test_slow_momentum_stays_where_a_rate_of_zero_moved_nobody():
    rates = [0.1, 0.0, 0.1]
    got, start = drive(partial(SlowMo, lr=0.9, momentum=0.6), rates, rounds=3)
    assert np.isfinite(got).all()
    differs(got, start)


# -- adaptive --------------------------------------------------------------------------------------------------------


def adaptive(x, kind, lr, b1, b2, tau, v0):
    """Reddi et al., algorithm 2."""
    first, second = np.zeros_like(x), np.full_like(x, v0)
    for target in targets(len(x)):
        change = mean_after(x, target) - x
        first = b1 * first + (1 - b1) * change
        if kind == "adagrad":
            second = second + change**2
        elif kind == "yogi":
            second = second - (1 - b2) * change**2 * np.sign(second - change**2)
        else:
            second = b2 * second + (1 - b2) * change**2
        x = x + lr * first / (np.sqrt(second) + tau)
    return x


@pytest.mark.identity(9)
@pytest.mark.parametrize(("factory", "kind"), [(FedAdam, "adam"), (FedYogi, "yogi")])
def test_fedadam_and_fedyogi_are_the_papers(factory, kind):
    got, start = drive(partial(factory, lr=0.1, betas=(0.9, 0.99), tau=1e-3))
    close(got, adaptive(start, kind, 0.1, 0.9, 0.99, 1e-3, 1e-6))
    differs(got, adaptive(start, "yogi" if kind == "adam" else "adam", 0.1, 0.9, 0.99, 1e-3, 1e-6))


@pytest.mark.identity(9)
def test_fedadagrad_is_torchs_adagrad():
    got, start = drive(partial(Adagrad, lr=0.1, initial_accumulator_value=1e-6, eps=1e-3))
    close(got, adaptive(start, "adagrad", 0.1, 0.0, 0.0, 1e-3, 1e-6))


def test_torchs_adam_is_of_the_family_and_not_the_same():
    ours = drive(partial(FedAdam, lr=0.1, betas=(0.9, 0.99), tau=1e-3))[0]
    differs(ours, drive(partial(Adam, lr=0.1, betas=(0.9, 0.99), eps=1e-3))[0])


# -- of pushes -------------------------------------------------------------------------------------------------------


def delayed(x, lr, momentum, delay):
    """Liu et al., algorithm 3: each push moves by its own gradient, the momentum at every `delay`-th."""
    velocity, waiting = np.zeros_like(x), np.zeros_like(x)
    for t, target in enumerate(targets(len(x)), 1):
        gradient = x - mean_after(x, target)
        waiting = waiting + gradient / delay
        x = x - lr * gradient / delay
        if t % delay == 0:
            velocity = momentum * velocity + waiting
            x, waiting = x - lr * momentum * velocity, np.zeros_like(x)
    return x


@pytest.mark.identity(9)
def test_delayed_nesterov_is_the_papers():
    got, start = drive(partial(DelayedNesterov, lr=0.7, momentum=0.9, delay=3))
    close(got, delayed(start, 0.7, 0.9, 3))
    differs(got, delayed(start, 0.7, 0.9, 4))


@pytest.mark.identity(9)
def test_delayed_nesterov_of_gradients_taken_at_milestones_is_nesterov_on_their_means():
    x = {
        "delayed": nn.Parameter(torch.zeros(5, dtype=torch.float64)),
        "mean": nn.Parameter(torch.zeros(5, dtype=torch.float64)),
    }
    pushes = DelayedNesterov([x["delayed"]], lr=0.7, momentum=0.9, delay=4)
    whole = SGD([x["mean"]], lr=0.7, momentum=0.9, nesterov=True)
    rng = np.random.default_rng(3)
    for _ in range(6):
        gradients = torch.from_numpy(rng.normal(size=(4, 5)))
        for gradient in gradients:
            x["delayed"].grad = gradient.clone()
            pushes.step()
        x["mean"].grad = gradients.mean(0)
        whole.step()
        torch.testing.assert_close(x["delayed"], x["mean"], rtol=1e-13, atol=1e-14)


@pytest.mark.identity(9)
def test_downpours_server_is_adagrad_on_summed_gradients():
    got, x = drive(partial(Downpour, lr=0.1, eps=1e-10), RATES)
    start, squares = x.copy(), np.zeros_like(x)
    for rate, target in zip(RATES, targets(len(x)), strict=True):
        gradient = (x - mean_after(x, target)) / rate
        squares = squares + gradient**2
        x = x - 0.1 * gradient / (np.sqrt(squares) + 1e-10)
    close(got, x)
    differs(got, start)
    differs(got, drive(partial(Adagrad, lr=0.1))[0])


# -- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factory",
    [FedAdam, FedYogi, SlowMo, DelayedNesterov, Downpour],
)
def test_state_survives_a_checkpoint_to_the_last_bit(factory):
    assert np.array_equal(drive(factory, RATES, restored_at=7)[0], drive(factory, RATES)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(FedAdam, lr=-1.0), r"lr=-1\.0: must be a number that is not negative"),
        (partial(FedAdam, tau=0.0), r"tau=0\.0: must be a positive number"),
        (partial(FedYogi, betas=(0.9, 1.0)), r"betas\[1\]=1\.0: must be a number from 0 to below 1"),
        (partial(SlowMo, momentum=1.0), r"momentum=1\.0: must be a number from 0 to below 1"),
        (partial(DelayedNesterov, delay=0), r"delay=0: must be a whole number of at least 1"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make([nn.Parameter(torch.zeros(2))])
