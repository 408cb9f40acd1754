"""L-BFGS over shards, one iteration a round: held to torch's own in one call, to scipy, and to closed forms."""

from __future__ import annotations

import copy
import re
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.optim import LBFGS
from twin import deal, flat, local_coordinator, make_fit, run, schema_of
from twin_faults import Plan

from sparkdeep.algorithms import lbfgs
from sparkdeep.errors import ConfigError, NonFiniteError, ReplicaLostError
from sparkdeep.models.program import Program
from sparkdeep.optim.gradient_rounds import Evaluations, GradientOuter
from sparkdeep.protocol.orders import RoundResult
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.local import LocalStore
from sparkdeep.tensors.parameters import Layout
from sparkdeep.tracking.records import RoundRecord

WOLFE = partial(LBFGS, history_size=10, line_search_fn="strong_wolfe")
COMMON = {"work": "gradient", "sync_every": "epoch"}


def program(model, loss=None, **given):
    return Program(model=model, loss=loss or nn.CrossEntropyLoss(), optimizer=torch.optim.SGD, **given)


def in_one_call(model, loss, x, y, *, iterations, evaluations=10**6, **given):
    """torch's own, over all rows at once; returns the parameters and the losses that it saw."""
    optimizer = WOLFE(model.parameters(), max_iter=iterations, max_eval=evaluations, **given)
    losses = []

    def closure():
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        losses.append(float(value.detach()))
        return value

    optimizer.step(closure)
    return flat(model), losses


def test_a_line_search_out_of_range_is_told_with_remedies_that_it_has(tmp_path):
    x = np.full((8, 1), 1e200)
    y = np.ones((8, 1))
    torch.manual_seed(0)
    own = program(nn.Linear(1, 1).double(), nn.MSELoss())
    with pytest.raises(NonFiniteError, match=r"at parameters that the line search tried.*scale the features") as caught:
        run(tmp_path, own, deal(x, y, [4, 4]), schema_of(x, y), epochs=3, batch_size=4, outer_optimizer=WOLFE, **COMMON)
    assert "clip_grad_norm" not in str(caught.value)


def test_a_bound_on_the_loss_has_no_meaning_beside_a_line_search(tmp_path):
    x, y = np.ones((8, 1)), np.ones((8, 1))
    own = program(nn.Linear(1, 1).double(), nn.MSELoss())
    with pytest.raises(ConfigError, match=r"divergence_factor=10.* with a line search"):
        run(tmp_path, own, deal(x, y, [4, 4]), schema_of(x, y), outer_optimizer=WOLFE, divergence_factor=10.0, **COMMON)


# -- against scipy ---------------------------------------------------------------------------------------------------


class Regularized(nn.Module):
    """Logistic regression whose penalty is part of the loss."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 1).double()
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.linear(x).squeeze(-1)


PENALTY = 0.05


def regularized(model, batch):
    return (
        nn.functional.binary_cross_entropy_with_logits(model(batch.features), batch.labels)
        + PENALTY / 2 * model.linear.weight.square().sum()
    )


@pytest.mark.identity(10)
def test_regularized_logistic_regression_equals_scipy(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 10))
    y = (x @ rng.normal(size=10) + rng.normal(size=300) > 0).astype(np.float64)

    def objective(theta):
        margin = x @ theta[:10] + theta[10]
        value = np.mean(np.logaddexp(0, margin) - y * margin) + PENALTY / 2 * theta[:10] @ theta[:10]
        slope = (1 / (1 + np.exp(-margin)) - y) / len(y)
        return value, np.append(x.T @ slope + PENALTY * theta[:10], slope.sum())

    best = minimize(objective, np.zeros(11), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10})
    preset = dict(lbfgs(iterations=100).settings) | {"portions": None}
    started = program(Regularized(10), training_step=regularized)
    trained, records, fit = run(tmp_path, started, deal(x, y, [120, 100, 80]), schema_of(x, y), batch_size=32, **preset)
    np.testing.assert_allclose(flat(trained).numpy(), best.x, atol=1e-5)
    assert abs(records[-1].loss - best.fun) < 1e-10
    assert abs(objective(flat(trained).numpy())[0] - records[-1].loss) < 1e-14, "the loss is that at the round's end"
    assert fit.state.stopped.startswith("converged:")
    assert len(records) < 50, "it stops by itself"
    without = minimize(lambda theta: objective(theta)[0] - PENALTY / 2 * theta[:10] @ theta[:10], np.zeros(11))
    assert np.abs(without.x - best.x).max() > 0.1, "without the penalty it would be elsewhere"


# -- against torch in one call ---------------------------------------------------------------------------------------


def convnet():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4)).double()


def images():
    rng = np.random.default_rng(3)
    return rng.normal(size=(60, 1, 8, 8)), rng.integers(0, 4, size=60)


@pytest.mark.identity(10)
def test_a_sharded_convnet_goes_the_way_of_torch_in_one_call(tmp_path):
    x, y = images()
    expected, losses = in_one_call(
        convnet(), nn.CrossEntropyLoss(), torch.from_numpy(x), torch.from_numpy(y), iterations=8
    )
    options = {"epochs": 8, "batch_size": 7, "outer_optimizer": WOLFE, **COMMON}
    trained, records, _ = run(tmp_path, program(convnet()), deal(x, y, [31, 20, 9]), schema_of(x, y), **options)
    torch.testing.assert_close(flat(trained), expected, rtol=0, atol=1e-10)
    asked = [one for record in records for one in record.evaluations]
    fresh = [one.loss for one in asked if not one.cached]
    np.testing.assert_allclose(fresh, losses, rtol=0, atol=1e-11)
    assert [one.cached for record in records[1:] for one in record.evaluations[:1]] == [True] * 7
    assert sum(record.rows for record in records) == 60 * len(losses)
    assert [RoundRecord.from_dict(record.to_dict()) for record in records] == records
    shorter = in_one_call(convnet(), nn.CrossEntropyLoss(), torch.from_numpy(x), torch.from_numpy(y), iterations=7)[0]
    assert (shorter - expected).abs().max() > 1e-6


class Objective:
    """A function and its gradient as a stage would give them; counts how often it is asked."""

    def __init__(self, function):
        self.function = function
        self.asked = 0
        self.fail_at = None
        self._room = None

    def at(self, parameters):
        self.asked += 1
        if self.asked == self.fail_at:
            raise ReplicaLostError("a replica went away")
        theta = parameters.detach().clone().requires_grad_()
        loss = self.function(theta)
        (gradient,) = torch.autograd.grad(loss, theta)
        if self._room is None:
            self._room = torch.empty_like(gradient)
        # As in a fit, the next mean is written over this one's memory.
        return RoundResult(
            mean=self._room.copy_(gradient),
            buffers={},
            sections=[],
            inner=torch.empty(0),
            loss=float(loss.detach()),
            updates=[],
            saved=[],
            seconds=0.0,
        )


class Run:
    """The outer step and its evaluations, as the loop drives them."""

    def __init__(self, function, start, factory=WOLFE):
        self.layout = Layout.of(nn.ParameterList([nn.Parameter(start.clone())]))
        self.parameters = start.clone()
        self.outer = GradientOuter(factory, self.parameters, self.layout)
        self.objective = Objective(function)
        self.evaluations = Evaluations(remember=True)

    def round(self):
        self.evaluations.begin()
        self.outer.step(
            self.parameters,
            lambda: self.evaluations.at(self.parameters, lambda: self.objective.at(self.parameters)),
        )
        return self.evaluations.end(self.parameters)

    def rounds(self, most):
        for done in range(most):
            if self.outer.stopped:
                return done
            self.round()
        return most


def quadratic(n, seed=0):
    """Of condition number 10, its minimum and its start; scaled so that no pair is dropped for being small."""
    torch.manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    matrix = 1e3 * turned @ torch.diag(torch.linspace(1, 10, n, dtype=torch.float64)) @ turned.T
    best = torch.randn(n, dtype=torch.float64)
    return (lambda x: (x - best) @ matrix @ (x - best) / 2), best, torch.zeros(n, dtype=torch.float64)


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()


START = torch.tensor([-1.2, 1.0, -0.5, 0.8], dtype=torch.float64)


def torch_alone(function, start, iterations, *, split=False):
    """The same optimizer without us; returns parameters and evaluations."""
    theta, asked = start.clone().requires_grad_(), 0
    optimizer = WOLFE([theta], max_iter=1 if split else iterations, max_eval=26 if split else 10**6)

    def closure():
        nonlocal asked
        asked += 1
        optimizer.zero_grad()
        value = function(theta)
        value.backward()
        return value

    for _ in range(iterations if split else 1):
        optimizer.step(closure)
    return theta.detach(), asked


@pytest.mark.parametrize("iterations", [1, 2, 5, 12, 25])
def test_one_iteration_a_round_is_one_call_to_the_last_bit_at_no_further_evaluation(iterations):
    expected, asked = torch_alone(rosenbrock, START, iterations)
    going = Run(rosenbrock, START)
    going.rounds(iterations)
    assert torch.equal(going.parameters, expected)
    assert going.objective.asked == asked
    if iterations > 1:
        again, more = torch_alone(rosenbrock, START, iterations, split=True)
        assert torch.equal(again, expected)
        assert more == asked + iterations - 1, "without what is known at the end, each round begins with one more"


@pytest.mark.identity(10)
@pytest.mark.parametrize("n", [5, 10, 20, 50])
def test_a_quadratic_is_minimized_within_three_evaluations_a_dimension(n):
    function, best, start = quadratic(n)
    going = Run(function, start)
    going.rounds(3 * n)
    assert (going.parameters - best).norm() / best.norm() < 1e-6
    assert going.objective.asked <= max(3 * n, 25)
    assert going.outer.stopped.startswith("converged:")


def test_it_stops_where_torch_stops():
    for function, start in ((rosenbrock, START), quadratic(12)[::2]):
        expected, asked = torch_alone(function, start, 200)
        going = Run(function, start)
        rounds = going.rounds(200)
        assert torch.equal(going.parameters, expected)
        assert going.objective.asked == asked
        assert rounds < 100
        assert "converged:" in going.outer.stopped


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tolerance_grad": 1e-1, "tolerance_change": 0.0}, "component of the gradient"),
        ({"tolerance_change": 1e-1, "tolerance_grad": 0.0}, "converged: (no parameter moved|the loss changed)"),
    ],
)
def test_why_it_stopped_is_told(given, message):
    going = Run(rosenbrock, START, partial(WOLFE, **given))
    going.rounds(200)
    assert re.search(message, going.outer.stopped)


def test_at_the_minimum_no_step_is_taken():
    going = Run(lambda x: x.square().sum(), torch.zeros(3, dtype=torch.float64))
    assert going.rounds(5) == 1
    assert going.objective.asked == 1
    assert "gradient" in going.outer.stopped


def test_a_round_that_fails_at_any_evaluation_is_as_if_it_had_not_begun_and_keeps_what_is_known():
    whole = Run(rosenbrock, START)
    whole.rounds(12)
    for fail_at in range(1, whole.objective.asked + 1):
        going = Run(rosenbrock, START)
        going.objective.fail_at = fail_at
        for _ in range(12):
            before, state = going.parameters.detach().clone(), copy.deepcopy(going.outer.state_dict())
            try:
                going.round()
            except ReplicaLostError:
                assert torch.equal(going.parameters, before)
                assert_same(going.outer.state_dict(), state)
                going.round()
        assert torch.equal(going.parameters, whole.parameters)
        assert going.objective.asked == whole.objective.asked + 1, "the one that failed, and no other, is repeated"


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


# -- in a whole fit ----------------------------------------------------------------------------------------------------


def test_a_run_can_be_resumed_at_every_iteration_with_the_same_bits(tmp_path):
    x, y = images()
    coordinator = local_coordinator()
    options = {"epochs": 6, "batch_size": 16, "outer_optimizer": partial(WOLFE, history_size=3), **COMMON}
    parts, schema = deal(x, y, [35, 25]), schema_of(x, y)

    def go(checkpoints, stop_after=None):
        fit = make_fit(
            tmp_path,
            program(convnet()),
            parts,
            schema,
            coordinator=coordinator,
            checkpoints=checkpoints,
            checkpoint_every=1,
            **options,
        )
        for record in (going := fit.rounds()):
            if record.round == stop_after:
                break
        going.close()
        return fit

    try:
        whole = go(None)
        for stop_after in (1, 2, 4):
            store = LocalStore(tmp_path / f"{stop_after}")
            go(CheckpointDirectory(store, identity={}), stop_after)
            resumed = go(CheckpointDirectory(store, identity={}))
            assert resumed.resumed_from == stop_after
            assert torch.equal(resumed.state.parameters, whole.state.parameters)
            assert [r.loss for r in resumed.state.records] == [r.loss for r in whole.state.records]
            first = resumed.state.records[stop_after].evaluations[0]
            assert not first.cached, "what is known at the parameters is evaluated once more"
            assert first.loss == whole.state.records[stop_after].evaluations[0].loss
    finally:
        coordinator.close()


def test_a_lost_replica_costs_the_evaluation_that_it_was_lost_in(tmp_path):
    rng = np.random.default_rng(5)
    x = np.concatenate([np.full((20, 1), 0.0), np.full((20, 1), 1.0)])
    x = np.concatenate([x, rng.normal(size=(40, 3))], 1)
    y = rng.normal(size=(40, 1))

    def go(plan):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        started = program(model, loss=nn.MSELoss(), preprocess=plan.hook())
        options = {"epochs": 5, "batch_size": 20, "outer_optimizer": WOLFE, "wrap": plan.wrap, **COMMON}
        return run(tmp_path, started, deal(x, y, [20, 20]), schema_of(x, y), **options)

    calm, records, _ = go(Plan())
    plan = Plan()
    plan.when = {(1, 3): plan.hang_up(1)}
    stormy, again, _ = go(plan)
    assert torch.equal(flat(stormy), flat(calm))
    assert sum(record.retries for record in again) == 1
    assert [record.loss for record in again] == [record.loss for record in records]


@pytest.mark.identity(10)
def test_portions_of_rows_do_not_change_the_result(tmp_path):
    x, y = images()
    options = {"epochs": 5, "batch_size": 60, "outer_optimizer": WOLFE, **COMMON}
    one = flat(run(tmp_path, program(convnet()), deal(x, y, [60]), schema_of(x, y), **options)[0])
    many = flat(run(tmp_path, program(convnet()), deal(x, y, [1, 19, 33, 7]), schema_of(x, y), **options)[0])
    torch.testing.assert_close(many, one, rtol=0, atol=1e-11)
    away = flat(run(tmp_path, program(convnet()), deal(x[:53], y[:53], [53]), schema_of(x, y), **options)[0])
    assert (away - one).abs().max() > 1e-3
