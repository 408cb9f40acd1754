"""Local steps on quadratics, whose fixed points are known: averaging, FedProx and SCAFFOLD against closed forms."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from twin import deal, flat, run, schema_of

from sparkdeep.errors import ConfigError
from sparkdeep.models.program import Program
from sparkdeep.optim.drift import FedProx, Scaffold
from sparkdeep.optim.local_work import Epochs, WarmStart

SIZE, REPLICAS, STEPS, RATE = 3, 4, 10, 0.05


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))


def quadratic(model, batch):
    """Each row is a quadratic: its Hessian, then the place of its least value."""
    rows = batch.features
    hessians, centers = rows[:, : SIZE * SIZE].view(-1, SIZE, SIZE), rows[:, SIZE * SIZE :]
    away = model.at - centers
    return (0.5 * torch.einsum("bi,bij,bj->b", away, hessians, away)).mean()


def problem(alike=False):
    rng = np.random.default_rng(5)
    roots = rng.normal(size=(REPLICAS, SIZE, SIZE))
    hessians = roots @ roots.transpose(0, 2, 1) + np.eye(SIZE)
    if alike:
        hessians[:] = hessians[0]
    return hessians, rng.normal(size=(REPLICAS, SIZE)) * 3


def trained(tmp_path, hessians, centers, rounds, optimizer=None, **options):
    """One row a replica, so that a local step is one step on its quadratic."""
    rows = np.concatenate([hessians.reshape(REPLICAS, -1), centers], axis=1)
    model = Point()
    optimizer = optimizer or partial(SGD, lr=RATE)
    own = Program(model=model, loss=None, training_step=quadratic, optimizer=optimizer)
    own = {"sync_every": "epoch", "schedule": Epochs(STEPS), "epochs": STEPS * rounds, "batch_size": 1, **options}, own
    _, records, _ = run(tmp_path, own[1], deal(rows, None, [1] * REPLICAS), schema_of(rows), **own[0])
    assert len(records) == rounds
    assert all(part.steps == STEPS for record in records for part in record.replicas)
    return flat(model).numpy()


def start():
    return flat(Point()).numpy()


def after_steps(at, hessian, center):
    """`center + (I - rate A)^H (at - center)`."""
    return center + np.linalg.matrix_power(np.eye(SIZE) - RATE * hessian, STEPS) @ (at - center)


def optimum(hessians, centers):
    return np.linalg.solve(hessians.sum(0), np.einsum("nij,nj->i", hessians, centers))


def averaged_fixed_point(hessians, centers):
    gone = np.array([np.eye(SIZE) - np.linalg.matrix_power(np.eye(SIZE) - RATE * a, STEPS) for a in hessians])
    return np.linalg.solve(gone.sum(0), np.einsum("nij,nj->i", gone, centers))


@pytest.mark.identity(6)
def test_a_shared_hessian_makes_averaging_the_steps_of_one_machine(tmp_path):
    hessians, centers = problem(alike=True)
    expected = start()
    for _ in range(3 * STEPS):  # gradient descent on the mean of the quadratics
        expected = expected - RATE * hessians[0] @ (expected - centers.mean(0))
    got = trained(tmp_path, hessians, centers, 3)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)
    unlike, _ = problem()
    other = trained(tmp_path, unlike, centers, 3)
    descent = start()
    for _ in range(3 * STEPS):
        descent = descent - RATE * np.einsum("nij,nj->i", unlike, descent - centers) / REPLICAS
    assert np.abs(other - descent).max() > 1e-3, "with unlike Hessians averaging is another method"


@pytest.mark.identity(6)
def test_a_round_is_the_mean_of_closed_forms(tmp_path):
    hessians, centers = problem()
    expected = start()
    for _ in range(2):
        expected = np.mean([after_steps(expected, a, b) for a, b in zip(hessians, centers, strict=True)], axis=0)
    np.testing.assert_allclose(trained(tmp_path, hessians, centers, 2), expected, rtol=0, atol=1e-13)


@pytest.mark.identity(7)
def test_averaging_goes_to_its_own_fixed_point_and_scaffold_to_the_optimum(tmp_path):
    hessians, centers = problem()
    fixed, best = averaged_fixed_point(hessians, centers), optimum(hessians, centers)
    plain = trained(tmp_path, hessians, centers, 60)
    np.testing.assert_allclose(plain, fixed, rtol=0, atol=1e-10)
    assert np.abs(plain - best).max() > 0.02
    corrected = trained(tmp_path, hessians, centers, 60, drift_correction=Scaffold())
    np.testing.assert_allclose(corrected, best, rtol=0, atol=1e-9)


@pytest.mark.identity(7)
def test_scaffold_is_the_papers_recurrence(tmp_path):
    hessians, centers = problem()
    at, common, own = start(), np.zeros(SIZE), np.zeros((REPLICAS, SIZE))
    for _ in range(4):
        ends, kept = [], []
        for i in range(REPLICAS):
            x = at.copy()
            for _ in range(STEPS):
                x = x - RATE * (hessians[i] @ (x - centers[i]) - own[i] + common)
            ends.append(x)
            kept.append(own[i] - common + (at - x) / (STEPS * RATE))
        common, own = common + np.mean(np.array(kept) - own, axis=0), np.array(kept)
        at = np.mean(ends, axis=0)
    got = trained(tmp_path, hessians, centers, 4, drift_correction=Scaffold())
    np.testing.assert_allclose(got, at, rtol=0, atol=1e-13)
    assert np.abs(got - trained(tmp_path, hessians, centers, 4)).max() > 1e-3


@pytest.mark.identity(7)
def test_the_fixed_point_of_fedprox_comes_nearer_to_the_optimum_with_mu(tmp_path):
    hessians, centers = problem()
    best = optimum(hessians, centers)
    away = []
    for mu in (0.0, 1.0, 4.0):
        options = {"drift_correction": FedProx(mu)} if mu else {}
        got = trained(tmp_path, hessians, centers, 20, **options)
        expected = start()
        for _ in range(20):
            ends = []
            for a, b in zip(hessians, centers, strict=True):
                x = expected.copy()
                for _ in range(STEPS):
                    x = x - RATE * (a @ (x - b) + mu * (x - expected))
                ends.append(x)
            expected = np.mean(ends, axis=0)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
        away.append(np.linalg.norm(got - best))
    assert away[0] > away[1] > away[2] > 0


class Branches(nn.Module):
    """Rows with a positive second feature go through `b`, which the others never touch; the loss is the weight."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        return (self.b if float(x[0, 1]) > 0 else self.a).expand(len(x), 1)


def _first(prediction, _label):
    return prediction.mean()


def test_scaffold_moves_what_only_one_replica_has_a_gradient_of(tmp_path):
    # Gradient 1 for `b` on one of two replicas, so 1/2 together: 4 rounds of 2 steps with a rate of 0.1 move it by 0.4.
    x = np.array([[0.0, -1.0]] * 2 + [[0.0, 1.0]] * 2)
    y = np.zeros((4, 1))
    own = Program(model=Branches(), loss=_first, optimizer=partial(SGD, lr=0.1))
    options = {"epochs": 4, "batch_size": 1, "sync_every": 2, "drift_correction": Scaffold()}
    run(tmp_path, own, deal(x, y, [2, 2]), schema_of(x, y), **options)
    for parameter in (own.model.a, own.model.b):
        assert float(parameter.detach()) == pytest.approx(-0.4, abs=1e-12)


@pytest.mark.parametrize("options", [{"rounds_per_stage": 1}, {"replica_state": "durable", "checkpoint_every": 1}])
def test_control_variates_outlive_a_stage(tmp_path, options):
    hessians, centers = problem()
    one = trained(tmp_path, hessians, centers, 5, drift_correction=Scaffold())
    assert np.array_equal(trained(tmp_path, hessians, centers, 5, drift_correction=Scaffold(), **options), one)


def test_a_round_without_a_replica_does_not_pull_from_the_optimum(tmp_path):
    """Replica 0 has two rows and the others one, so that every other round is its alone."""
    hessians, centers = problem()
    rows = np.concatenate([hessians.reshape(REPLICAS, -1), centers], axis=1)
    rows = np.concatenate([rows[:1], rows])
    weights = np.array([0.5, 0.5, 1.0, 1.0, 1.0])
    model = Point()
    own = Program(model=model, loss=None, training_step=_weighted, optimizer=partial(SGD, lr=RATE))
    parts = deal(rows, None, [2, 1, 1, 1], weights)
    options = {"epochs": 300, "batch_size": 1, "sync_every": 1, "drift_correction": Scaffold()}
    _, records, fit = run(tmp_path, own, parts, schema_of(rows, w=weights), **options)
    assert [sum(p.weight > 0 for p in r.replicas) for r in records[:2]] == [4, 1]
    assert fit.state.sections == ["control_variate"]
    assert float(fit.state.inner.abs().max()) < 0.1


def _weighted(model, batch):
    return (quadratic(model, batch) * batch.weights).mean()


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (partial(Adam, lr=RATE), r"Scaffold\(\) with the optimizer Adam: .* Give partial\(torch.optim.SGD"),
        (partial(SGD, lr=RATE, momentum=0.9), r"Scaffold\(\) with the optimizer SGD\(momentum=0\.9\)"),
        (partial(SGD, lr=RATE, maximize=True), r"Scaffold\(\) with the optimizer SGD\(maximize=True\)"),
    ],
)
def test_scaffold_wants_plain_gradient_steps(tmp_path, optimizer, said):
    with pytest.raises(ConfigError, match=said):
        trained(tmp_path, *problem(), 1, optimizer=optimizer, drift_correction=Scaffold())


@pytest.mark.parametrize(
    "options",
    [
        {"quorum": 2},
        {"min_workers": 2},
        {"on_nonfinite": "drop"},
        {"codec": "int8"},
        {"clip_grad_norm": 1.0},
        {"schedule": WarmStart(3)},
        {"schedule": None, "time_budget_s": 1.0, "weighting": "rows"},
        {"inner_state": "average"},
        {"overlap": 1, "schedule": None},
    ],
)
def test_scaffold_wants_replicas_that_stay_and_count(tmp_path, options):
    with pytest.raises(ConfigError, match=r"drift_correction=Scaffold\(\) with"):
        trained(tmp_path, *problem(), 1, drift_correction=Scaffold(), **options)
