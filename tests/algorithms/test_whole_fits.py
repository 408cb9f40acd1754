"""Properties that whole fits must have, whatever the algorithm, and DiLoCo as a whole against a plain loop."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from plain_loop import epoch_batches
from torch import nn
from torch.optim import SGD, AdamW
from twin import deal, facts_of, flat, run, schema_of, write_shards

from sparkdeep import algorithms
from sparkdeep.models.program import Program
from sparkdeep.optim.local_work import Epochs

SIZES = [12, 12, 12]


def table(rows=36):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(rows, 4))
    return x, np.tanh(x @ rng.normal(size=(4, 2))) + 0.1 * rng.normal(size=(rows, 2))


def network(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def fitted(tmp_path, parts, *, optimizer=None, loss=None, model=None, **options):
    x, y = table()
    own = Program(
        model=model or network(), loss=loss or nn.MSELoss(), optimizer=optimizer or partial(SGD, lr=0.1, momentum=0.9)
    )
    run(tmp_path, own, parts, schema_of(x, y), **{"epochs": 3, "batch_size": 12, "sync_every": 1, **options})
    return flat(own.model)


def whole():
    return deal(*table(), SIZES)


# -- identity 17 -----------------------------------------------------------------------------------------------------


@pytest.mark.identity(17)
def test_which_replica_has_which_rows_does_not_matter(tmp_path):
    parts = whole()
    turned = fitted(tmp_path, [parts[2], parts[0], parts[1]])
    torch.testing.assert_close(turned, fitted(tmp_path, parts), rtol=1e-13, atol=1e-14)
    other = fitted(tmp_path, parts, epochs=2)
    assert (turned - other).abs().max() > 1e-3


@pytest.mark.identity(17)
def test_one_replica_split_in_two_is_the_same_at_a_round_a_step(tmp_path):
    x, y = table(24)
    halves = fitted(tmp_path, deal(x, y, [12, 12]))
    one = fitted(tmp_path, deal(x, y, [24]), batch_size=24)
    torch.testing.assert_close(halves, one, rtol=1e-12, atol=1e-13)
    local = fitted(tmp_path, deal(x, y, [12, 12]), batch_size=6, sync_every=2)
    assert (local - one).abs().max() > 1e-4, "two local steps between averages are another method"


def _ten_times(output, label):
    return 10 * nn.functional.mse_loss(output, label)


@pytest.mark.identity(17)
def test_a_loss_ten_times_as_large_at_a_tenth_of_the_rate_is_the_same(tmp_path):
    scaled = fitted(tmp_path, whole(), loss=_ten_times, optimizer=partial(SGD, lr=0.01, momentum=0.9), sync_every=2)
    torch.testing.assert_close(scaled, fitted(tmp_path, whole(), sync_every=2), rtol=1e-12, atol=1e-13)
    unscaled = fitted(tmp_path, whole(), loss=_ten_times, sync_every=2)
    assert (scaled - unscaled).abs().max() > 1e-3


@pytest.mark.identity(17)
def test_the_mean_of_bfloat16_replicas_is_rounded_once_and_kept_in_float32(tmp_path):
    x, y = (a.astype(np.float32) for a in table())
    model = network(torch.bfloat16)
    own = Program(model=model, loss=nn.MSELoss(), optimizer=partial(SGD, lr=0.1), preprocess=_narrow)
    _, _, fit = run(tmp_path, own, deal(x, y, SIZES), schema_of(x, y), epochs=1, batch_size=4, sync_every=3)
    kept = fit.state.parameters.detach()
    assert kept.dtype == torch.float32
    assert not torch.equal(kept, kept.to(torch.bfloat16).float()), "a mean of three needs more bits than bfloat16 has"
    assert torch.equal(flat(model), kept.to(torch.bfloat16))


def _narrow(features):
    return features.to(torch.bfloat16)


# -- DiLoCo as a whole (identities 5, 9 and 15) ----------------------------------------------------------------------


def diloco(rounds, *, steps, lr, momentum, sign=1.0):
    """Each replica takes `steps` of its own AdamW; Nesterov's method takes minus the mean change for a gradient."""
    x, y = (torch.from_numpy(a) for a in table())
    models = [network() for _ in SIZES]
    optimizers = [AdamW(model.parameters(), lr=0.02) for model in models]
    at = flat(models[0])
    velocity = torch.zeros_like(at)
    for _ in range(rounds):
        ends = []
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            nn.utils.vector_to_parameters(at.clone(), model.parameters())
            rows = slice(12 * i, 12 * (i + 1))
            for _ in range(steps):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
                optimizer.step()
            ends.append(flat(model))
        gradient = sign * (at - sum(ends) / len(ends))
        velocity = momentum * velocity + gradient
        at = at - lr * (gradient + momentum * velocity)
    return at


@pytest.mark.identity(5)
@pytest.mark.identity(15)
def test_diloco_is_its_recurrence_and_the_other_sign_is_not(tmp_path):
    preset = dict(algorithms.diloco(lr=0.6, momentum=0.8, sync_every=1).settings)
    preset["optimizer"] = partial(AdamW, lr=0.02)
    options = {"epochs": 6, "schedule": Epochs(3), **preset}
    got = fitted(tmp_path, whole(), **options)
    expected = diloco(2, steps=3, lr=0.6, momentum=0.8)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    assert (got - diloco(2, steps=3, lr=0.6, momentum=0.8, sign=-1.0)).abs().max() > 1e-2
    start = flat(network())
    x, y = (torch.from_numpy(a) for a in table())

    def loss(vector):
        model = copy.deepcopy(network())
        nn.utils.vector_to_parameters(vector.detach(), model.parameters())
        with torch.no_grad():
            return float(nn.functional.mse_loss(model(x), y))

    assert loss(got) < loss(start) < loss(diloco(2, steps=3, lr=0.6, momentum=0.8, sign=-1.0))


@pytest.mark.identity(15)
@pytest.mark.parametrize("mix", [None, 0.5])
def test_in_how_many_fragments_vectors_travel_changes_not_a_bit(tmp_path, mix):
    options = {"overlap": 1, "overlap_mix": mix, "outer_optimizer": partial(SGD, lr=0.7, momentum=0.9, nesterov=True)}
    one = fitted(tmp_path, whole(), **options)
    for fragments in (2, 7):
        assert torch.equal(fitted(tmp_path, whole(), overlap_fragments=fragments, **options), one)
    assert not torch.equal(one, fitted(tmp_path, whole(), **{**options, "overlap": 0, "overlap_mix": None}))


# -- slow momentum under a rate that changes within a round ----------------------------------------------------------


@pytest.mark.parametrize("warm", [0, 8])
def test_slow_momentum_is_in_units_of_the_rates_of_the_rounds_own_steps(tmp_path, warm):
    def rate(step):
        return 1.0 - step / 12 if not warm else min(1.0, step / warm)

    options = {"epochs": 3, "sync_every": 3, "batch_size": 3, **algorithms.slowmo(sync_every=2).settings}
    own = {
        "optimizer": partial(SGD, lr=0.2),
        "lr_scheduler": partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=rate),
    }
    x, y = table(12)
    program = Program(model=network(), loss=nn.MSELoss(), **own)
    run(tmp_path, program, deal(x, y, [12]), schema_of(x, y), **options)
    got = flat(program.model)

    digest = _facts(tmp_path, x, y).digest

    def recurrence(rate_of):
        """The local steps again, from where the outer step left the parameters; the plain loop's batches in its order."""
        model = network()
        optimizer = SGD(model.parameters(), lr=0.2)
        clock = own["lr_scheduler"](optimizer)
        batches = [b for e in range(3) for b in epoch_batches(12, 3, digest=digest, epoch=e)]
        at, slow = flat(model), torch.zeros_like(flat(model))
        for first in range(0, len(batches), 2):
            nn.utils.vector_to_parameters(at.clone(), model.parameters())
            rates = []
            for rows in batches[first : first + 2]:
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.zero_grad()
                nn.functional.mse_loss(model(torch.from_numpy(x[rows])), torch.from_numpy(y[rows])).backward()
                optimizer.step()
                clock.step()
            gamma = rate_of(rates)
            slow = 0.5 * slow + (at - flat(model)) / gamma if gamma else slow
            at = at - gamma * slow if gamma else at
        return at

    torch.testing.assert_close(got, recurrence(lambda rates: sum(rates) / len(rates)), rtol=1e-12, atol=1e-13)
    assert (got - recurrence(lambda rates: rates[0])).abs().max() > 1e-4


def _facts(tmp_path, x, y):
    (path,) = write_shards(tmp_path / "again", deal(x, y, [12]), schema_of(x, y))
    return facts_of([path])[0]
