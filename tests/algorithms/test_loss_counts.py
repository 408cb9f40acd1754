"""Losses that do not divide by rows: whatever is between them and the gradient, they are plain torch's on all rows at once."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from twin import deal, flat, run, schema_of

from sparkdeep import algorithms
from sparkdeep.models.program import Program

DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(60, 4))
Y = DRAW.choice(3, 60, p=[0.55, 0.3, 0.15]).astype(np.int64)
ROW_WEIGHTS = DRAW.integers(0, 4, 60).astype(np.float64)
FEATURES, LABELS = torch.from_numpy(X), torch.from_numpy(Y)
UNIT = partial(torch.optim.SGD, lr=1.0)
CLASS_WEIGHTS = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
KINDS = {
    "class weights": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
    "ignored labels": nn.CrossEntropyLoss(ignore_index=1),
    "in a function": lambda output, label: F.cross_entropy(output, label, weight=CLASS_WEIGHTS),
    "stated": lambda output, label: (
        F.cross_entropy(output, label, weight=CLASS_WEIGHTS, reduction="sum"),
        CLASS_WEIGHTS[label].sum(),
    ),
}


def hidden(output, label):
    """A mean over class weights that nobody can see."""
    losses = F.cross_entropy(output, label, weight=CLASS_WEIGHTS, reduction="none")
    return losses.sum() / CLASS_WEIGHTS[label].sum()


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def value(loss, model, rows=slice(None)):
    got = loss(model(FEATURES[rows]), LABELS[rows])
    return got[0] / got[1] if isinstance(got, tuple) else got


def one_step(loss):
    model = linear()
    value(loss, model).backward()
    UNIT(model.parameters()).step()
    return flat(model)


def fit(tmp_path, loss, sizes, *, x=X, y=Y, w=None, optimizer=UNIT, step=None, validation=None, **settings):
    program = Program(model=linear(), loss=loss, training_step=step, optimizer=optimizer)
    parts = deal(x, y, sizes, w)
    options = {"batch_size": 20, "epochs": 1, "sync_every": 1, **settings}
    return run(tmp_path, program, parts, schema_of(x, y, w), validation=validation, **options)


WAYS = {
    "accumulated": ([60], {"batch_size": 15, "accumulate_batches": 4}),
    "three replicas": ([20, 20, 20], {}),
    "unlike replicas": ([7, 20, 33], {"batch_size": 33}),
    "accumulated on three": ([20, 20, 20], {"batch_size": 5, "accumulate_batches": 4}),
    "gradients": ([20, 20, 20], {"work": "gradient", "outer_optimizer": UNIT}),
    "gradients, accumulated": (
        [41, 19],
        {"batch_size": 9, "accumulate_batches": 5, "work": "gradient", "outer_optimizer": UNIT},
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_plain_torchs_on_all_rows(tmp_path, kind, way):
    sizes, settings = WAYS[way]
    loss = KINDS[kind]
    model, records, _ = fit(tmp_path, loss, sizes, **settings)
    right = one_step(loss)
    assert float((right - flat(linear())).abs().max()) > 0.1
    torch.testing.assert_close(flat(model), right, rtol=0, atol=1e-12)
    assert records[-1].loss == pytest.approx(float(value(loss, linear()).detach()), abs=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_a_count_that_cannot_be_seen_is_taken_for_rows(tmp_path, way):
    sizes, settings = WAYS[way]
    model, _, _ = fit(tmp_path, hidden, sizes, **settings)
    assert float((flat(model) - one_step(hidden)).abs().max()) > 0.01


@pytest.mark.parametrize("way", WAYS)
def test_training_steps_too(tmp_path, way):
    sizes, settings = WAYS[way]
    loss = KINDS["class weights"]
    model, _, _ = fit(tmp_path, None, sizes, step=lambda m, batch: loss(m(batch.features), batch.labels), **settings)
    torch.testing.assert_close(flat(model), one_step(loss), rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["class weights", "ignored labels"])
def test_weights_of_rows_beside_it_are_copies_of_rows(tmp_path, kind, way):
    sizes, settings = WAYS[way]
    loss = KINDS[kind]
    model, _, _ = fit(tmp_path, loss, sizes, w=ROW_WEIGHTS, **settings)
    copies, own = torch.from_numpy(ROW_WEIGHTS).long(), linear()
    loss(own(FEATURES.repeat_interleave(copies, 0)), LABELS.repeat_interleave(copies, 0)).backward()
    UNIT(own.parameters()).step()
    torch.testing.assert_close(flat(model), flat(own), rtol=0, atol=1e-12)


def validated(tmp_path, loss, size, rows=60):
    """The validation loss of a network that stands still."""
    cut = rows // 2
    kept = [{"features": X[:cut], "label": Y[:cut]}, {"features": X[cut:rows], "label": Y[cut:rows]}]
    still = partial(torch.optim.SGD, lr=0.0)
    _, records, _ = fit(tmp_path, loss, [30, 30], optimizer=still, batch_size=size, sync_every="epoch", validation=kept)
    return records[-1].metrics["loss"]


@pytest.mark.parametrize("size", [4, 6, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_the_validation_loss_depends_on_no_batch(tmp_path, kind, size):
    right = float(value(KINDS[kind], linear()).detach())
    assert validated(tmp_path, KINDS[kind], size) == pytest.approx(right, abs=1e-12)


def test_the_validation_loss_of_a_hidden_count_does(tmp_path):
    assert abs(validated(tmp_path, hidden, 4) - float(hidden(linear()(FEATURES), LABELS).detach())) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_lbfgs_ends_at_the_lowest_loss_and_reports_it(tmp_path, kind):
    loss, lowest = KINDS[kind], linear()
    solver = torch.optim.LBFGS(
        lowest.parameters(), max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        now = value(loss, lowest)
        now.backward()
        return now

    solver.step(closure)
    outer = algorithms.lbfgs(iterations=200).settings["outer_optimizer"]
    settings = {"batch_size": 16, "epochs": 100, "sync_every": "epoch", "work": "gradient", "outer_optimizer": outer}
    model, records, _ = fit(tmp_path, loss, [41, 19], **settings)
    right = float(value(loss, lowest).detach())
    assert float(value(loss, model).detach()) == pytest.approx(right, abs=1e-9)
    assert records[-1].loss == pytest.approx(right, abs=1e-6)


def test_a_replica_of_which_all_rows_are_ignored_counts_for_nothing(tmp_path):
    labels = Y.copy()
    labels[:8] = -100
    loss = nn.CrossEntropyLoss()
    model, records, _ = fit(tmp_path, loss, [8, 52], y=labels, batch_size=52)
    own = linear()
    loss(own(FEATURES), torch.from_numpy(labels)).backward()
    UNIT(own.parameters()).step()
    torch.testing.assert_close(flat(model), flat(own), rtol=0, atol=1e-12)
    assert records[-1].replicas[0].weight == 0
    assert np.isfinite(records[-1].loss)


def test_validation_rows_that_are_ignored_leave_the_mean_as_it_is(tmp_path):
    labels = Y[:9].copy()
    labels[8] = -100
    kept = [{"features": X[:9], "label": labels}]
    loss = nn.CrossEntropyLoss()
    model, records, _ = fit(tmp_path, loss, [60], batch_size=8, validation=kept, sync_every="epoch")
    right = float(loss(model(FEATURES[:9]), torch.from_numpy(labels)).detach())
    assert records[-1].metrics["loss"] == pytest.approx(right, abs=1e-12)
