"""What a loss was divided by: torch's own means over labels, wherever they are called, and what a function says itself."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparkdeep.data.batches import Batch
from sparkdeep.models.denominators import DenominatorWatch, number_of
from sparkdeep.models.losses import LossFunction
from sparkdeep.models.program import Program

LOGITS = torch.linspace(-2, 3, 6 * 3, dtype=torch.float64).reshape(6, 3).sin()
SEQUENCE = torch.linspace(-2, 3, 6 * 3 * 5, dtype=torch.float64).reshape(6, 3, 5).sin()
CLASSES = torch.tensor([0, 2, 1, 2, 0, 1])
SOME = torch.tensor([0, -100, 1, 2, -100, 1])
STEPS = torch.tensor([[0, 1, 2, -100, 1], [2, 2, -100, -100, -100], [1, 0, 1, 0, 1]]).repeat(2, 1)
WEIGHT = torch.tensor([0.25, 1.0, 8.0], dtype=torch.float64)
PROBABILITIES = LOGITS.flip(0).softmax(1)


def function_of(loss, *, step=None, weighted=False):
    program = Program(model=nn.Identity(), loss=loss, optimizer=torch.optim.SGD, training_step=step)
    return LossFunction(program, weighted=weighted)


def batch_of(labels, weights=None, features=None):
    features = torch.zeros(len(labels)) if features is None else features
    return Batch(features=features, labels=labels, weights=weights, rows=len(labels))


KINDS = [
    (nn.CrossEntropyLoss(), LOGITS, CLASSES),
    (nn.CrossEntropyLoss(), LOGITS, SOME),
    (nn.CrossEntropyLoss(weight=WEIGHT), LOGITS, CLASSES),
    (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=2, label_smoothing=0.1), LOGITS, CLASSES),
    (nn.CrossEntropyLoss(weight=WEIGHT), SEQUENCE, STEPS),
    (nn.CrossEntropyLoss(), SEQUENCE, STEPS),
    (nn.CrossEntropyLoss(weight=WEIGHT), LOGITS, PROBABILITIES),
    (nn.NLLLoss(weight=WEIGHT), LOGITS.log_softmax(1), SOME),
    (nn.NLLLoss(ignore_index=0), LOGITS.log_softmax(1), CLASSES),
    (nn.MSELoss(), LOGITS, PROBABILITIES),
    (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), LOGITS, PROBABILITIES),
    (nn.KLDivLoss(reduction="batchmean"), LOGITS.log_softmax(1), PROBABILITIES),
    (nn.MultiMarginLoss(weight=WEIGHT), LOGITS, CLASSES),
]
IDS = [f"{kind}-{tuple(labels.shape)}-{i}" for i, (kind, _, labels) in enumerate(KINDS)]


def joined(function, output, labels, cut, weights=None):
    """The mean over two batches by their counts."""
    parts = [
        function.of_output(output[own], batch_of(labels[own], None if weights is None else weights[own]))
        for own in (slice(0, cut), slice(cut, None))
    ]
    counts = [number_of(part.count) for part in parts]
    return sum(part.mean * count for part, count in zip(parts, counts, strict=True) if count) / sum(counts)


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
@pytest.mark.parametrize(("kind", "output", "labels"), KINDS, ids=IDS)
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_the_mean_over_batches_is_the_loss_of_all_rows(kind, output, labels, cut):
    exact = kind(output, labels)
    called = {"module": kind, "function": lambda o, y: kind(o, y), "partial": partial(kind)}
    for how, loss in called.items():
        got = joined(function_of(loss), output, labels, cut)
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12, msg=how)
    weights = torch.tensor([1.0, 2.0, 0.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    copies = weights.long()
    repeated = kind(output.repeat_interleave(copies, 0), labels.repeat_interleave(copies, 0))
    got = joined(function_of(kind, weighted=True), output, labels, cut, weights)
    torch.testing.assert_close(got, repeated, rtol=1e-12, atol=1e-12)


def test_by_rows_it_is_another_number():
    kind = nn.CrossEntropyLoss(weight=WEIGHT)
    by_rows = (kind(LOGITS[:1], CLASSES[:1]) * 1 + kind(LOGITS[1:], CLASSES[1:]) * 5) / 6
    assert abs(float(by_rows - kind(LOGITS, CLASSES))) > 0.01


@pytest.mark.parametrize(("kind", "output", "labels"), KINDS, ids=IDS)
def test_a_count_that_is_known_beforehand_is_the_losss_own(kind, output, labels):
    known, late = function_of(kind), function_of(lambda o, y: kind(o, y))
    batch = batch_of(labels)
    assert number_of(known.count(batch)) == number_of(known.of_output(output, batch).count)
    assert late.count(batch) is None
    weights = torch.tensor([1.0, 2.0, 0.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    known, batch = function_of(kind, weighted=True), batch_of(labels, weights)
    assert number_of(known.count(batch)) == pytest.approx(number_of(known.of_output(output, batch).count), rel=1e-15)


def test_every_mean_over_labels_of_torch_is_known():
    names = [name for name in dir(F) if name.endswith(("cross_entropy", "nll_loss")) and not name.startswith("_")]
    rows = {"binary_cross_entropy", "gaussian_nll_loss", "poisson_nll_loss"}  # which divide by elements
    assert sorted(set(names) - rows) == sorted({"cross_entropy", "nll_loss", "linear_cross_entropy"} & set(dir(F)))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="since torch 2.13")
def test_the_loss_over_a_layer_and_its_labels():
    layer = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    labels = torch.tensor([0, 3, 1, 3, 3, 2])

    def loss(output, label):
        return F.linear_cross_entropy(output, layer, label, ignore_index=3)

    exact = loss(LOGITS, labels)
    torch.testing.assert_close(joined(function_of(loss), LOGITS, labels, 2), exact, rtol=1e-12, atol=1e-12)


def step_with(loss):
    return lambda model, batch: loss(model(batch.features), batch.labels)


def test_a_training_step_divides_by_what_it_calls():
    step = function_of(None, step=step_with(nn.CrossEntropyLoss(weight=WEIGHT)))
    assert number_of(step(nn.Identity(), batch_of(CLASSES, features=LOGITS)).count) == float(WEIGHT[CLASSES].sum())
    scaled = function_of(None, step=step_with(lambda o, y: 0.5 * F.cross_entropy(o, y) + o.square().mean()))
    assert number_of(scaled(nn.Identity(), batch_of(SOME, features=LOGITS)).count) == 4


def test_what_is_looked_at_beside_the_loss_does_not_count():
    def step(model, batch):
        output = model(batch.features)
        with torch.no_grad():
            F.cross_entropy(output, batch.labels, weight=WEIGHT)
        return F.cross_entropy(output, batch.labels)

    assert number_of(function_of(None, step=step)(nn.Identity(), batch_of(SOME, features=LOGITS)).count) == 4


def test_parts_that_divide_by_different_counts_divide_by_rows_together():
    def step(model, batch):
        output = model(batch.features)
        return F.cross_entropy(output, batch.labels) + F.cross_entropy(output, CLASSES)

    assert number_of(function_of(None, step=step)(nn.Identity(), batch_of(SOME, features=LOGITS)).count) == 6


def test_sums_and_other_reductions_are_not_taken_for_means():
    with DenominatorWatch() as watch:
        F.cross_entropy(LOGITS, SOME, reduction="sum")
        F.cross_entropy(LOGITS, SOME, reduction="none")
    assert watch.count() is None


def masked(output, label):
    """As users write it who count themselves."""
    losses = F.cross_entropy(output, label.clamp(min=0), reduction="none")
    return (losses * (label >= 0)).sum(), (label >= 0).sum()


@pytest.mark.parametrize("how", ["loss", "step"])
def test_a_function_may_say_what_it_divides_by(how):
    function = function_of(masked) if how == "loss" else function_of(None, step=step_with(masked))
    batch = batch_of(SOME, features=LOGITS)
    got = function(nn.Identity(), batch)
    assert number_of(got.count) == 4
    torch.testing.assert_close(got.mean, nn.CrossEntropyLoss()(LOGITS, SOME))
    nothing = function(nn.Identity(), dataclasses.replace(batch, labels=torch.full((6,), -1)))
    assert number_of(nothing.count) == 0
    assert nothing.mean == 0


def test_a_batch_without_a_label_that_counts_has_a_gradient_of_zero():
    output = LOGITS.clone().requires_grad_()
    loss = function_of(nn.CrossEntropyLoss()).of_output(output, batch_of(torch.full((6,), -100)))
    (loss.mean * loss.count).backward()
    assert number_of(loss.count) == 0
    assert output.grad.abs().max() == 0
