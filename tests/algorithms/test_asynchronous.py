"""Asynchronous rounds held to written-out simulations of their arrivals, and to the synchronous rounds that they must equal."""

from __future__ import annotations

import copy
import dataclasses
import random
import time
from functools import partial

import numpy as np
import pytest
import torch
from plain_loop import epoch_batches
from torch import nn
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from twin import deal, flat, local_coordinator, make_fit, run, schema_of

from sparkdeep import seams
from sparkdeep.arrivals import FETCHED, Arrivals
from sparkdeep.asynchrony import Asynchronous
from sparkdeep.checkpoint import CheckpointDirectory
from sparkdeep.errors import ConfigError, NonFiniteError, ReplicaLostError
from sparkdeep.injection import Injector
from sparkdeep.local_work import DyLU, PostLocal, WarmStart
from sparkdeep.messages import Visit
from sparkdeep.metrics import RoundRecord
from sparkdeep.outer_optimizers import DelayedNesterov, Downpour
from sparkdeep.program import Program
from sparkdeep.round_values import RoundWork
from sparkdeep.schedule import RoundSpec
from sparkdeep.store import LocalStore

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
            tmp_path, program(model=model, augment=DarkFrom(5)), deal(x, y, [16]), schema_of(x, y),
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


# -- replay -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("options", [
    {}, {"time_budget_s": 0.01, "schedule": WarmStart(4)}, {"schedule": DyLU(), "sync_every": 3},
], ids=["epochs", "seconds", "dylu"])  # fmt: skip
def test_a_recorded_run_gives_its_bits_again(tmp_path, options):
    rule, outer = Asynchronous(1, 2), partial(DelayedNesterov, lr=0.3, delay=2)
    with Slow(1, 0.01):
        got, records, _ = train(tmp_path, rule, outer, own=dropping(), **options)
    with Slow(0, 0.005):
        again, repeated, _ = train(tmp_path, rule, outer, own=dropping(), replay=records, **options)
    assert torch.equal(got, again)
    assert [r.arrivals for r in repeated] == [r.arrivals for r in records]
    assert [[p.steps for p in r.replicas] for r in repeated] == [[p.steps for p in r.replicas] for r in records]
    assert [r.loss for r in repeated] == [r.loss for r in records]
    if not options:
        orders = [sorted(records[0].arrivals), sorted(records[0].arrivals, reverse=True)]
        others = [[dataclasses.replace(records[0], arrivals=order), *records[1:]] for order in orders]
        trained = [train(tmp_path, rule, outer, own=dropping(), replay=other)[0] for other in others]
        assert not all(torch.equal(one, got) for one in trained)


def test_a_warm_start_has_the_first_replica_alone(tmp_path):
    _, records, _ = train(
        tmp_path, Asynchronous(), partial(Downpour, lr=0.02), [24, 24], schedule=WarmStart(4), sync_every="epoch"
    )
    assert [r.replicas[1].dropped for r in records] == ["idle", "", ""]
    assert {replica for replica, _ in records[0].arrivals} == {0}
    assert {replica for replica, _ in records[1].arrivals} == {0, 1}
    assert [[p.steps for p in r.replicas] for r in records] == [[4, 0], [2, 2], [6, 6]]


def test_a_warm_start_by_the_clock_leaves_the_others_all_their_rows(tmp_path):
    sizes, warm = [24, 16], WarmStart(7)
    _, records, _ = train(
        tmp_path, Asynchronous(), partial(Downpour, lr=0.02), sizes, schedule=warm, time_budget_s=0.001
    )
    alone = [r for r in records if r.replicas[1].dropped == "idle"]
    assert sum(r.replicas[0].steps for r in alone) == 7
    assert alone == records[: len(alone)]
    assert not any(r.replicas[1].steps or r.replicas[1].skipped_steps for r in alone)
    assert [sum(r.replicas[i].steps for r in records) for i in range(2)] == [12, 8]
    # A warm start that is longer than the first replica's rows ends with them.
    _, records, _ = train(
        tmp_path, Asynchronous(), partial(Downpour, lr=0.02), sizes, schedule=WarmStart(100), time_budget_s=0.001
    )
    assert [sum(r.replicas[i].steps for r in records) for i in range(2)] == [12, 8]


@pytest.mark.parametrize("rule", [Asynchronous(1, 3), Asynchronous(1, 2)], ids=str)
def test_a_record_of_other_pushes_is_refused(tmp_path, rule):
    outer = partial(Downpour, lr=0.02)
    _, records, _ = train(tmp_path, Asynchronous(2, 2) if rule.n_push == 3 else Asynchronous(1, 1), outer)
    cut = [dataclasses.replace(record, arrivals=record.arrivals[:-1]) for record in records]
    with pytest.raises(ConfigError, match=r"n_fetch, n_push and batch_size that it had"):
        train(tmp_path, rule, outer, replay=records if rule.n_push == 3 else cut)


# -- staleness ---------------------------------------------------------------------------------------------------------


def _without(early, arrivals):
    """Arrivals without one of each replica's."""
    for replica, _ in early:
        arrivals.remove(next(one for one in arrivals if one[0] == replica))
    return arrivals


@pytest.mark.parametrize(("rule", "bound"), [((1, 1), 2), ((2, 2), 3), ((3, 2), 4), ((1, 2), 2)], ids=str)
def test_no_push_is_staler_than_it_may_be(tmp_path, rule, bound):
    sizes, outer = [32, 32, 16], partial(Downpour, lr=0.02)
    with Slow(2, 0.05):
        _, bounded, _ = train(tmp_path, Asynchronous(*rule, max_staleness=bound), outer, sizes)
    # In a script all of the others come between a fetch of the last replica and the push that follows it.
    early = [[2, 0]] if rule[1] > rule[0] else []
    late = [dataclasses.replace(r, arrivals=early + _without(early, sorted(r.arrivals))) for r in bounded]
    _, free, _ = train(tmp_path, Asynchronous(*rule), outer, sizes, replay=late)
    assert max(s for r in free for _, s in r.arrivals) > bound
    assert max(s for r in bounded for _, s in r.arrivals) <= bound
    pushes = [[sum(i == j and s != FETCHED for i, s in r.arrivals) for j in range(3)] for r in bounded]
    assert pushes == [[-(-8 // rule[1]), -(-8 // rule[1]), -(-4 // rule[1])]] * EPOCHS


@pytest.mark.parametrize("seed", range(40))
def test_whoever_may_come_first_somebody_always_may_and_none_is_too_stale(seed):
    rng = random.Random(seed)
    count, n_fetch, n_push = rng.randint(1, 6), rng.randint(1, 6), rng.randint(1, 6)
    rule = Asynchronous(n_fetch, n_push)
    bound = rule.least_staleness(count) + rng.choice((0, 0, 1, 4))
    rule = dataclasses.replace(rule, max_staleness=bound)
    lengths = [rng.randint(1, 40) for _ in range(count)]
    specs = [RoundSpec(round=1, epoch=0, first_step=0, num_steps=length) for length in lengths]
    work = RoundWork(specs=specs, clocks=[0] * count, rows=[1] * count, apply=lambda _change, _clock, _steps: None)
    x = torch.zeros(1)
    window = Arrivals(count, work, rule, x, lambda: None)

    def next_of(replica):
        steps = window._steps[replica] + 1
        while steps < lengths[replica] and steps % n_push and steps % n_fetch:
            steps += 1
        last = steps == lengths[replica]
        pushes, fetches = last or steps % n_push == 0, not last and steps % n_fetch == 0
        return Visit(round=1, steps=steps, pushes=pushes, fetches=fetches, finite=True), last

    fast = rng.randrange(count)
    while window._working:
        able = [(i, *next_of(i)) for i in sorted(window._working)]
        able = [(i, visit, last) for i, visit, last in able if window._may_come(i, visit, last=last)]
        assert able, "all wait for each other"
        i, visit, last = next((one for one in able if one[0] == fast), rng.choice(able))
        window._come(i, visit, x, last=last)
    assert max(staleness for _, staleness in window.log) <= bound
    assert sum(s != FETCHED for _, s in window.log) == sum(-(-length // n_push) for length in lengths)


def test_who_waits_for_a_slow_replica_is_not_taken_for_a_silent_one(tmp_path):
    rule = Asynchronous(3, 1, max_staleness=5)
    with Slow(1, 0.8):  # its third visit, in which it fetches, is what the other one's sixth waits for, to fetch
        _, records, _ = train(tmp_path, rule, partial(Downpour, lr=0.02), [32, 32], epochs=1, stall_timeout_s=2.3)
    assert len(records) == 1
    assert not records[0].retries


def test_a_record_whose_arrivals_were_not_kept_is_refused_with_where_to_get_them(tmp_path):
    rule, outer = Asynchronous(1, 1), partial(Downpour, lr=0.02)
    _, records, _ = train(tmp_path, rule, outer)
    cut = [dataclasses.replace(record, arrivals=[]) for record in records]
    with pytest.raises(ConfigError, match=r"round 1 is repeated from a record without arrivals.*written as they came"):
        train(tmp_path, rule, outer, replay=cut)


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["step", "transfer", "corrupt"])
def test_a_window_in_which_a_replica_was_lost_is_undone_and_repeated(tmp_path, phase):
    rule, outer = Asynchronous(1, 1), partial(Downpour, lr=0.02)
    got, records, _ = train(tmp_path, rule, outer, own=dropping())
    plan = Injector(tmp_path / "plan")
    if phase == "corrupt":
        plan.corrupt_at("transfer", 2, 1)
    else:
        plan.fail_at(phase, 2, 1)
    with plan.installed(), pytest.raises(ReplicaLostError):
        train(tmp_path, rule, outer, own=dropping(), replay=records)
    plan.check_fired()
    plan = Injector(tmp_path / "again")
    plan.corrupt_at("transfer", 2, 1) if phase == "corrupt" else plan.fail_at(phase, 2, 1)
    with plan.installed():
        again, repeated, _ = train(tmp_path, rule, outer, own=dropping(), replay=records, max_retries=2)
    assert torch.equal(got, again)
    assert [r.retries for r in repeated] == [0, 1]
    assert [r.arrivals for r in repeated] == [r.arrivals for r in records]


class Fails:
    """Raises, or gives NaN, in the n-th batch of a shard."""

    def __init__(self, batch):
        self.batch, self.calls = batch, 0

    def __call__(self, features):
        self.calls += 1
        return features * float("nan") if self.calls == self.batch else features


def test_a_push_that_is_not_finite_ends_the_fit_and_leaves_no_trace(tmp_path):
    coordinator = local_coordinator()
    try:
        sizes = [24, 24]
        fit = make_fit(
            tmp_path, program(augment=Fails(9)), deal(X[:48], Y[:48], sizes), SCHEMA, coordinator=coordinator,
            **options_of(Asynchronous(1, 1), partial(Downpour, lr=0.02)),
        )  # fmt: skip
        rounds = fit.rounds()
        next(rounds)
        before = fit.state.parameters.detach().clone()
        squares = copy.deepcopy(fit.outer.state_dict())
        with pytest.raises(NonFiniteError, match="round 2"):
            next(rounds)
        assert torch.equal(fit.state.parameters, before)
        for place, state in fit.outer.state_dict()["state"].items():
            assert torch.equal(state["sum"], squares["state"][place]["sum"])
    finally:
        coordinator.close()


def test_a_run_resumed_from_a_checkpoint_is_the_undisturbed_one(tmp_path):
    rule, outer = Asynchronous(1, 2), partial(DelayedNesterov, lr=0.3, delay=2)
    settings = {"epochs": 4, "checkpoint_every": 1}
    got, records, _ = train(tmp_path, rule, outer, own=dropping(), **settings)
    coordinator = local_coordinator()
    folder = tmp_path / "checkpoints"
    try:
        fit = make_fit(
            tmp_path, dropping(), deal(X[:48], Y[:48], SIZES), SCHEMA, coordinator=coordinator, replay=records,
            checkpoints=CheckpointDirectory(LocalStore(folder), identity={}),
            **options_of(rule, outer, **settings),
        )  # fmt: skip
        rounds = fit.rounds()
        assert [next(rounds).round, next(rounds).round] == [1, 2]
        rounds.close()
    finally:
        coordinator.close()
    again, rest, fit = train(
        tmp_path, rule, outer, own=dropping(), replay=records, **settings,
        checkpoints=CheckpointDirectory(LocalStore(folder), identity={}),
    )  # fmt: skip
    assert [r.round for r in rest] == [3, 4]
    assert torch.equal(got, again)
    assert [r.arrivals for r in fit.state.records] == [r.arrivals for r in records]


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
