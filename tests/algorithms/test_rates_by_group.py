"""Learning rates by parameter group: a method that divides by the rate takes each parameter's own."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from plain_loop import epoch_batches
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from twin import deal, flat, run, schema_of

from sparkdeep.errors import ConfigError
from sparkdeep.models.program import Program
from sparkdeep.optim.asynchronous import Asynchronous
from sparkdeep.optim.drift import ControlVariates, Scaffold
from sparkdeep.optim.outer import Downpour, SlowMo
from sparkdeep.rounds.inner_rates import InnerRates

DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(64, 4))
Y = (X @ np.arange(1, 5) / 4 + 0.1 * DRAW.normal(size=64))[:, None]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def groups(first, second):
    return lambda ps: torch.optim.SGD([{"params": ps[:2], "lr": first}, {"params": ps[2:], "lr": second}], lr=0.1)


def decaying(optimizer):
    return LambdaLR(optimizer, [lambda t: 0.5**t, lambda t: 1.0])


def fit(tmp_path, optimizer, sizes=(32, 32), *, scheduler=None, **settings):
    program = Program(model=net(), loss=nn.MSELoss(), optimizer=optimizer, lr_scheduler=scheduler)
    options = {"batch_size": 8, "epochs": 5, "sync_every": 5, **settings}
    return run(tmp_path, program, deal(X, Y, sizes), schema_of(X, Y), **options)


def slowmo(digest, rates_of, momentum=0.5):
    """Wang et al. (2020), one replica, rounds of two steps; `rates_of`: the two groups' mean rates -> those divided by."""
    model = net()
    optimizer = groups(0.1, 0.1)(list(model.parameters()))
    clock, slow = decaying(optimizer), [torch.zeros_like(p) for p in model.parameters()]
    batches = list(epoch_batches(64, 8, digest=digest, epoch=0))
    for first in range(0, 8, 2):
        start, rates = [p.detach().clone() for p in model.parameters()], []
        for batch in batches[first : first + 2]:
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.zero_grad()
            nn.functional.mse_loss(model(torch.from_numpy(X[batch])), torch.from_numpy(Y[batch])).backward()
            optimizer.step()
            clock.step()
        with torch.no_grad():
            for k, (p, before) in enumerate(zip(model.parameters(), start, strict=True)):
                rate = rates_of(np.mean(rates, 0))[k // 2]
                slow[k] = momentum * slow[k] + (before - p) / rate
                p.copy_(before - rate * slow[k])
    return flat(model)


def test_slowmo_divides_by_each_parameters_own_rate(tmp_path):
    outer = partial(SlowMo, lr=1.0, momentum=0.5)
    options = {"scheduler": decaying, "epochs": 1, "sync_every": 2, "outer_optimizer": outer}
    model, _, own = fit(tmp_path, groups(0.1, 0.1), [64], **options)
    digest = own.shards[0].digest
    torch.testing.assert_close(flat(model), slowmo(digest, lambda rates: rates), rtol=0, atol=1e-12)
    by_first = slowmo(digest, lambda rates: rates[[0, 0]])
    assert float((flat(model) - by_first).abs().max()) > 1e-3


def moved(model):
    return float((model[2].weight - net()[2].weight).detach().abs().max())


def test_a_first_group_that_is_kept_does_not_keep_the_others(tmp_path):
    kept = groups(0.0, 0.1)
    slow, _, _ = fit(tmp_path, kept, outer_optimizer=partial(SlowMo, lr=1.0, momentum=0.5))
    plain, _, _ = fit(tmp_path, kept, outer_optimizer=partial(torch.optim.SGD, lr=1.0, momentum=0.5))
    torch.testing.assert_close(flat(slow), flat(plain), rtol=0, atol=1e-12)  # at a constant rate it cancels
    assert moved(slow) > 0.05
    assert torch.equal(slow[0].weight, net()[0].weight)
    pushes = {"asynchronous": Asynchronous(n_fetch=1, n_push=1), "sync_every": "epoch", "epochs": 2}
    down, _, _ = fit(tmp_path, kept, outer_optimizer=partial(Downpour, lr=0.1), **pushes)
    assert moved(down) > 0.05
    assert torch.equal(down[0].weight, net()[0].weight)


def test_scaffolds_control_variate_is_the_mean_gradient_whatever_the_rates():
    a, b, c = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.4}, {"params": [b, c], "lr": 0.1}])
    clock = LambdaLR(optimizer, [lambda t: 0.5**t, lambda t: 1.0])
    term = ControlVariates([a, b, c])
    gradients = torch.arange(36, dtype=torch.float64).reshape(4, 3, 3).sin()
    for first in (0, 2):
        term.begin()
        seen = []
        for step in range(first, first + 2):
            for parameter, gradient in zip((a, b, c), gradients[step], strict=True):
                parameter.grad = gradient.clone()
            term.adjust()
            seen.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            term.stepped(optimizer.param_groups)
            clock.step()
        own, weights = term.end(), np.array(seen) / np.sum(seen, 0)
        for place, got in enumerate(own):
            shares = torch.from_numpy(weights[:, min(place, 1)])
            torch.testing.assert_close(got, shares @ gradients[first : first + 2, place], rtol=1e-12, atol=1e-12)
        term.take([value + 1 for value in own])  # the mean over replicas; the correction in the next round is 1


def test_scaffold_keeps_the_control_variate_of_a_parameter_that_stands_still():
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.0}, {"params": [b], "lr": 0.1}])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1), requires_grad=False)], "lr": 1.0})  # a frozen one
    term = ControlVariates([a, b])
    term.load_state_dict({"own": [torch.full((2,), 7.0), torch.zeros(2)]})
    term.begin()
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    term.stepped(optimizer.param_groups)
    kept, learned = term.end()
    assert kept.tolist() == [7.0, 7.0]
    torch.testing.assert_close(learned, torch.ones(2))


def test_losses_fall_under_scaffold_whichever_group_decays(tmp_path):
    def slower(optimizer):
        return LambdaLR(optimizer, [lambda t: 0.6**t, lambda t: 1.0])

    _, records, _ = fit(
        tmp_path, groups(0.1, 0.1), scheduler=slower, epochs=8, sync_every=4, drift_correction=Scaffold()
    )
    assert records[-1].loss < 0.5 * records[0].loss


def test_a_schedule_goes_by_the_highest_rate_and_a_parameter_without_a_group_has_none():
    def some(ps):
        return torch.optim.SGD([{"params": [ps[0]], "lr": 0.0}, {"params": [ps[2]], "lr": 0.3}], lr=0.1)

    rates = InnerRates(Program(model=net(), loss=nn.MSELoss(), optimizer=some, lr_scheduler=decaying))
    assert rates.at(3) == 0.3
    assert rates.mean(0, 2) == [0.0, 0.0, 0.3, 0.0]
    own = InnerRates(Program(model=net(), loss=nn.MSELoss(), optimizer=groups(0.2, 0.1), lr_scheduler=decaying))
    assert own.mean(1, 2) == pytest.approx([0.075, 0.075, 0.1, 0.1])
    assert own.highest(5) == 0.2

    def without(ps):
        optimizer = groups(0.2, 0.1)(ps)
        del optimizer.param_groups[1]["lr"]
        return optimizer

    with pytest.raises(ConfigError, match=r"tells the learning rate None"):
        InnerRates(Program(model=net(), loss=nn.MSELoss(), optimizer=without)).at(0)
