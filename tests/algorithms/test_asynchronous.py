"""Asynchronous rounds held to written-out simulations of their arrivals, and to the synchronous rounds that they must equal."""

from __future__ import annotations

import dataclasses
import random
from functools import partial

import numpy as np
import pytest
import torch
from asynchronous_runs import (
    BATCH,
    EPOCHS,
    EXACT,
    RATE,
    SIZES,
    X,
    Y,
    net,
    options_of,
    program,
    train,
)
from plain_loop import epoch_batches
from torch import nn
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from twin import deal, local_coordinator, make_fit, schema_of

from sparkdeep.errors import ConfigError
from sparkdeep.optim.asynchronous import FETCHED, Asynchronous
from sparkdeep.optim.local_work import PostLocal
from sparkdeep.optim.outer import DelayedNesterov, Downpour
from sparkdeep.tracking.records import RoundRecord

# -- written out ------------------------------------------------------------------------------------------------------


class Adagrad:
    """Downpour's server: the change in units of gradients, divided by the root of their summed squares."""

    def __init__(self, lr=0.02, eps=1e-10):
        self.lr, self.eps, self.squares = lr, eps, 0.0

    def __call__(self, x, change, rate):
        gradient = -change / rate
        self.squares = self.squares + gradient**2
        return x - self.lr * gradient / (self.squares.sqrt() + self.eps)


class Delayed:
    """Delayed Nesterov: a share of every change at once, momentum at every `delay`-th."""

    def __init__(self, lr=0.7, momentum=0.9, delay=3):
        self.lr, self.beta, self.delay = lr, momentum, delay
        self.momentum, self.waiting = 0.0, []

    def __call__(self, x, change, rate):
        gradient = -change
        self.waiting.append(gradient)
        x = x - self.lr * gradient / self.delay
        if len(self.waiting) == self.delay:
            self.momentum = self.beta * self.momentum + sum(self.waiting) / self.delay
            self.waiting = []
            x = x - self.lr * self.beta * self.momentum
        return x


def one_step(vector, rows, rate):
    model = net()
    nn.utils.vector_to_parameters(vector, model.parameters())
    nn.MSELoss()(model(torch.from_numpy(rows[0])), torch.from_numpy(rows[1])).backward()
    return vector - rate * torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def simulated(orders, rule, server, digests, *, sizes=SIZES, rate=lambda step: RATE, fresh=False):
    """The run written out: windows of an epoch, in each of which replicas come in in a given order.

    Args:
        orders: of each window, replica after replica.
        rule: n_fetch and n_push.
        server: (parameters, change, rate) -> parameters.
        digests: of the replicas' shards.
        sizes: of their shards.
        rate: the inner one by steps of the common clock.
        fresh: whether every segment starts from the newest parameters, which is not asynchronous at all.
    """
    bounds = np.cumsum([0, *sizes])
    x = nn.utils.parameters_to_vector(net().parameters()).detach()
    staleness = []
    for epoch, order in enumerate(orders):
        clock = epoch * -(-max(sizes) // BATCH)
        batches = [epoch_batches(size, BATCH, digest=d, epoch=epoch) for size, d in zip(sizes, digests, strict=True)]
        own, base = [x.clone() for _ in sizes], [x.clone() for _ in sizes]
        change = [torch.zeros_like(x) for _ in sizes]
        steps, pushed, behind = [0] * len(sizes), [0] * len(sizes), [0] * len(sizes)
        told = []
        for i in order:
            if fresh:
                own[i], base[i] = x.clone(), x.clone()
            while True:
                rows = bounds[i] + batches[i][steps[i]]
                own[i] = one_step(own[i], (X[rows], Y[rows]), rate(clock + steps[i]))
                steps[i] += 1
                last = steps[i] == len(batches[i])
                pushes = steps[i] % rule.n_push == 0 or last
                fetches = steps[i] % rule.n_fetch == 0
                if pushes or fetches:
                    break
            change[i] += own[i] - base[i]
            base[i] = own[i].clone()
            told.append([i, behind[i] if pushes else FETCHED])
            if pushes:
                x = server(x, change[i], rate(clock + pushed[i]))
                change[i] = torch.zeros_like(x)
                behind = [b + (j != i) for j, b in enumerate(behind)]
            pushed[i] = steps[i]
            if fetches and not last:
                own[i], base[i], behind[i] = x.clone(), x.clone(), 0
        assert steps == [len(b) for b in batches]
        staleness.append(told)
    return x, staleness


def digests_of(fit):
    return [shard.digest for shard in fit.state.generation.shards]


def orders_of(records):
    return [[replica for replica, _ in record.arrivals] for record in records]


ADAGRAD, DELAYED = (partial(Downpour, lr=0.02), Adagrad), (partial(DelayedNesterov, delay=3), Delayed)
TRACES = [(ADAGRAD, r) for r in [(1, 1), (2, 2), (2, 3), (3, 2), (4, 1), (1, 4)]] + [
    (DELAYED, r) for r in [(1, 1), (2, 2), (3, 2)]
]


@pytest.mark.identity(16)
@pytest.mark.parametrize(("servers", "rule"), TRACES, ids=lambda one: one[1].__name__ if callable(one[1]) else str(one))
def test_a_run_is_the_written_out_trace_of_its_arrivals(tmp_path, servers, rule):
    (outer, server), rule = servers, Asynchronous(*rule)
    got, records, fit = train(tmp_path, rule, outer)
    expected, staleness = simulated(orders_of(records), rule, server(), digests_of(fit))
    torch.testing.assert_close(got, expected, **EXACT)
    assert [record.arrivals for record in records] == staleness
    assert [[part.steps for part in record.replicas] for record in records] == [[6, 4, 2]] * EPOCHS
    # What has another order, or no staleness, is another run.
    sorted_orders = [sorted(order) for order in orders_of(records)]
    backwards = [sorted(order, reverse=True) for order in orders_of(records)]
    others = [simulated(o, rule, server(), digests_of(fit))[0] for o in (sorted_orders, backwards)]
    others.append(simulated(orders_of(records), rule, server(), digests_of(fit), fresh=True)[0])
    assert max((got - other).abs().max() for other in others[:2]) > 1e-6
    assert (got - others[2]).abs().max() > 1e-6 or not any(s > 0 for told in staleness for _, s in told)


@pytest.mark.parametrize("rule", [Asynchronous(1, 1), Asynchronous(2, 3)], ids=str)
def test_an_arrival_script_is_followed_to_the_last_bit(tmp_path, rule):
    outer = partial(Downpour, lr=0.02)
    _, records, _ = train(tmp_path, rule, outer)
    shuffled = []
    for window, record in enumerate(records):
        order = list(record.arrivals)
        random.Random(window).shuffle(order)
        shuffled.append(dataclasses.replace(record, arrivals=order))
    got, followed, fit = train(tmp_path, rule, outer, replay=shuffled)
    assert orders_of(followed) == orders_of(shuffled)
    assert torch.equal(got, train(tmp_path, rule, outer, replay=shuffled)[0])
    expected, staleness = simulated(orders_of(shuffled), rule, Adagrad(), digests_of(fit))
    torch.testing.assert_close(got, expected, **EXACT)
    assert [record.arrivals for record in followed] == staleness
    by_record = simulated(orders_of(records), rule, Adagrad(), digests_of(fit))[0]
    assert (got - by_record).abs().max() > 1e-6


def test_a_push_is_in_units_of_the_rate_at_which_its_steps_were_taken(tmp_path):
    rule, schedule = Asynchronous(1, 1), partial(StepLR, step_size=3, gamma=0.5)
    got, records, fit = train(tmp_path, rule, partial(Downpour, lr=0.02), own=program(lr_scheduler=schedule))
    decayed = partial(simulated, orders_of(records), rule, digests=digests_of(fit))
    expected, _ = decayed(server=Adagrad(), rate=lambda step: RATE * 0.5 ** (step // 3))
    torch.testing.assert_close(got, expected, **EXACT)

    class AtStart(Adagrad):
        def __call__(self, x, change, rate):
            return super().__call__(x, change, RATE)

    other, _ = decayed(server=AtStart(), rate=lambda step: RATE * 0.5 ** (step // 3))
    assert (got - other).abs().max() > 1e-6


# -- what it must equal -----------------------------------------------------------------------------------------------


@pytest.mark.identity(16)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_one_replica_that_fetches_when_it_pushes_is_synchronous(tmp_path, steps):
    def own():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1)).double()
        return program(partial(AdamW, lr=0.02), model, lr_scheduler=partial(StepLR, step_size=2, gamma=0.9))

    one = partial(SGD, lr=1.0)
    windows, rounds, wrong = own(), own(), own()
    got, records, _ = train(tmp_path, Asynchronous(steps, steps), one, [24], own=windows)
    expected, _, _ = train(tmp_path, None, one, [24], own=rounds, sync_every=steps)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    for name, values in windows.model.named_buffers():
        torch.testing.assert_close(values, dict(rounds.model.named_buffers())[name], rtol=1e-14, atol=1e-14)
    assert all(staleness == 0 for record in records for _, staleness in record.arrivals)
    assert sum(len(record.arrivals) for record in records) == EPOCHS * -(-6 // steps)
    other, _, _ = train(tmp_path, Asynchronous(steps, steps), partial(SGD, lr=0.9), [24], own=wrong)
    assert (other - expected).abs().max() > 1e-4


@pytest.mark.identity(16)
def test_one_push_of_each_replica_a_window_is_the_mean_of_a_synchronous_round(tmp_path):
    sizes, rule = [24, 24, 24], Asynchronous(2, 2)
    got, records, _ = train(tmp_path, rule, partial(SGD, lr=1 / 3), sizes, sync_every=2)
    mean, _, _ = train(tmp_path, None, None, sizes, sync_every=2)
    torch.testing.assert_close(got, mean, rtol=1e-13, atol=1e-14)
    assert [sorted(s for _, s in record.arrivals) for record in records] == [[0, 1, 2]] * len(records)
    several, _, _ = train(tmp_path, Asynchronous(1, 1), partial(SGD, lr=1 / 3), sizes, sync_every=2)
    assert (several - mean).abs().max() > 1e-5


class DarkFrom:
    """Features are 0 from the n-th batch on: no weight of a first layer has a gradient any more."""

    def __init__(self, batch):
        self.batch, self.calls = batch, 0

    def __call__(self, features):
        self.calls += 1
        return features * 0 if self.calls >= self.batch else features


def test_what_a_narrow_model_rounds_off_is_not_pushed(tmp_path):
    model = nn.Linear(3, 1).to(torch.bfloat16)  # all rounds in one stage: each has a program, and a count, of its own
    x, y = X[:16].astype(np.float32), Y[:16].astype(np.float32)
    coordinator = local_coordinator()
    try:
        fit = make_fit(
            tmp_path, program(model=model, augment=DarkFrom(5), buffers={"augment.calls": "local"}), deal(x, y, [16]), schema_of(x, y),
            coordinator=coordinator, **options_of(Asynchronous(1, 2), partial(Downpour, lr=0.02), epochs=3), rounds_per_stage=9,
        )  # fmt: skip
        seen = [fit.state.parameters.detach().clone() for _ in fit.rounds()]
    finally:
        coordinator.close()
    assert seen[0].dtype == torch.float32
    assert not torch.equal(seen[0], seen[0].bfloat16().float()), "there is something to round off"
    assert torch.equal(seen[1][:3], seen[0][:3])
    assert torch.equal(seen[2][:3], seen[0][:3])
    assert not torch.equal(seen[2][3:], seen[0][3:])


# -- records and refusals ----------------------------------------------------------------------------------------------


class Again(SGD):
    """Asks for the gradient a second time."""

    def step(self, closure):
        closure()
        return super().step(closure)


def test_arrivals_are_kept_in_records_and_old_records_have_none(tmp_path):
    _, records, _ = train(tmp_path, Asynchronous(2, 3), partial(Downpour, lr=0.02))
    values = records[0].to_dict()
    assert RoundRecord.from_dict(values).arrivals == records[0].arrivals
    assert RoundRecord.from_dict({k: v for k, v in values.items() if k != "arrivals"}).arrivals == []
    assert train(tmp_path, None, None)[1][0].arrivals == []


@pytest.mark.parametrize(("asynchronous", "outer", "options", "words"), [
    (Asynchronous(), None, {}, "downpour"),
    (Asynchronous(), Again, {}, "needs a closure"),
    (Asynchronous(), LBFGS, {}, "work='gradient'"),
    (Asynchronous(1, 1, max_staleness=1), Downpour, {}, "at least 2, or None"),
    (Asynchronous(4, 1, max_staleness=7), Downpour, {}, "at least 8, or None"),
    (Asynchronous(), Downpour, {"quorum": 2}, "quorum=2"),
    (Asynchronous(), Downpour, {"schedule": PostLocal(), "time_budget_s": 1.0}, "leaves the number open"),
    (Asynchronous(), Downpour, {"codec": "int8"}, "codec='int8'"),
    (Asynchronous(), Downpour, {"inner_state": "average"}, "inner_state='average'"),
    (Asynchronous(), Downpour, {"aggregation": "ring"}, "aggregation='ring'"),
], ids=str)  # fmt: skip
def test_what_cannot_be_meant_together_is_refused(tmp_path, asynchronous, outer, options, words):
    with pytest.raises(ConfigError, match=words):
        train(tmp_path, asynchronous, outer, **options)


def test_the_least_bound_counts_how_often_others_push_between_fetches():
    least = [Asynchronous(f, p).least_staleness(2) for f, p in [(1, 1), (1, 3), (3, 1), (2, 2), (3, 2), (2, 3)]]
    assert least == [1, 1, 3, 1, 2, 2]
