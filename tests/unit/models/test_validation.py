"""Scores summed on replicas and merged on the driver equal scores of all rows at once."""

from __future__ import annotations

import math

import pytest
import torch
import torchmetrics
from torch import nn

from sparkdeep.data.batches import Batch
from sparkdeep.errors import ConfigError
from sparkdeep.models.losses import LossFunction
from sparkdeep.models.program import Program
from sparkdeep.models.validation import Evaluator, check_metrics, merge_scores
from sparkdeep.tensors.state_dicts import pack, unpack


def rows(count=57, classes=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, classes, generator=generator)
    return x, torch.randint(0, classes, (count,), generator=generator)


def scores(x, y, metrics, *, shares, size=8, loss=None, weights=None):
    """Each replica scores its share in batches; the results travel as bytes."""
    loss = loss or nn.CrossEntropyLoss()
    program = Program(model=nn.Identity(), loss=loss, optimizer=torch.optim.SGD, metrics=metrics)
    parts, start = [], 0
    for share in shares:
        evaluator = Evaluator(LossFunction(program, weighted=weights is not None), metrics, has_step=False)
        for first in range(start, start + share, size):
            stop = min(first + size, start + share)
            w = None if weights is None else weights[first:stop]
            evaluator.add(
                program.model, Batch(features=x[first:stop], labels=y[first:stop], weights=w, rows=stop - first)
            )
        start += share
        parts.append(unpack(pack(evaluator.scores())))
    assert start == len(x)
    return merge_scores(parts, metrics)


SHARES = [[57], [20, 37], [3, 0, 54], [19, 19, 19], [56, 1]]


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_the_loss_is_that_of_all_rows_at_once(shares):
    x, y = rows()
    merged = scores(x, y, {}, shares=shares)
    assert merged == {"loss": pytest.approx(nn.functional.cross_entropy(x.double(), y).item(), rel=1e-6)}


METRICS = {
    "accuracy": lambda: torchmetrics.Accuracy(task="multiclass", num_classes=3),
    "macro accuracy": lambda: torchmetrics.Accuracy(task="multiclass", num_classes=3, average="macro"),
    "auroc": lambda: torchmetrics.AUROC(task="multiclass", num_classes=3),
    "auroc in bins": lambda: torchmetrics.AUROC(task="multiclass", num_classes=3, thresholds=20),
    "f1": lambda: torchmetrics.F1Score(task="multiclass", num_classes=3, average="macro"),
}


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("name", METRICS)
def test_torchmetrics_merge_to_their_value_on_all_rows_at_once(name, shares):
    x, y = rows()
    x = x.softmax(1)
    whole = METRICS[name]()
    whole.update(x, y)
    merged = scores(x, y, {"m": METRICS[name]()}, shares=shares)
    assert merged["m"] == pytest.approx(whole.compute().item(), rel=1e-6)


@pytest.mark.parametrize(
    "name", ["MeanMetric", "MeanSquaredError", "MaxMetric", "MinMetric", "R2Score", "PearsonCorrCoef"]
)
def test_torchmetrics_of_numbers_merge_too(name):
    x, y = torch.randn(57, generator=torch.Generator().manual_seed(1)), torch.arange(57.0) / 57

    class Of(getattr(torchmetrics, name)):
        def update(self, output, label):
            one = name in {"MeanMetric", "MaxMetric", "MinMetric"}
            super().update(output) if one else super().update(output, label)

    whole = Of()
    whole.update(x, y)
    for shares in SHARES:
        merged = scores(x, y, {"m": Of()}, shares=shares, loss=nn.MSELoss())
        assert merged["m"] == pytest.approx(whole.compute().item(), rel=1e-4)


def test_the_mean_of_batchwise_f1_is_not_f1_which_is_why_states_are_merged():
    x, y = rows()
    whole = METRICS["f1"]()
    whole.update(x, y)
    per_batch = scores(x, y, {"m": lambda o, t: METRICS["f1"]()(o, t)}, shares=[57])
    assert abs(per_batch["m"] - whole.compute().item()) > 0.01


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_a_callable_is_the_mean_over_rows(shares):
    x, y = rows()
    merged = scores(x, y, {"hit": lambda o, t: (o.argmax(1) == t).float().mean()}, shares=shares)
    assert merged["hit"] == pytest.approx((x.argmax(1) == y).double().mean().item(), rel=1e-6)


def test_weights_of_rows_weigh_the_loss():
    x, y = rows()
    weights = torch.arange(57.0)
    merged = scores(x, y, {}, shares=[20, 37], weights=weights)
    per_row = nn.functional.cross_entropy(x.double(), y, reduction="none")
    assert merged["loss"] == pytest.approx(((per_row * weights).sum() / weights.sum()).item(), rel=1e-5)
    assert merged["loss"] != pytest.approx(per_row.mean().item(), rel=1e-3)


def test_no_rows_at_all_score_nan():
    x, y = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    merged = scores(x, y, {"hit": lambda o, t: 1.0}, shares=[0, 0])
    assert all(math.isnan(value) for value in merged.values())


def test_metrics_do_not_remember_an_earlier_round():
    x, y = rows()
    metric = METRICS["accuracy"]()
    first = scores(x, y, {"m": metric}, shares=[20, 37])
    metric.update(x, (y + 1) % 3)  # the driver's own object is touched by nobody, and counts for nothing
    assert scores(x, y, {"m": metric}, shares=[20, 37]) == first


def test_a_metric_of_several_numbers_is_refused_with_a_remedy():
    x, y = rows()
    metric = torchmetrics.Accuracy(task="multiclass", num_classes=3, average="none")
    with pytest.raises(ConfigError, match=r"metric 'm' gives .*average='macro'"):
        scores(x, y, {"m": metric}, shares=[57])


@pytest.mark.parametrize(
    ("metrics", "complaint"),
    [
        ({"loss": max}, "'loss' is taken by sparkdeep"),
        ({"f1": 3}, r"'f1' is a int; give a callable f\(output, label\)"),
    ],
)
def test_what_is_no_metric_is_refused_by_its_name(metrics, complaint):
    with pytest.raises(ConfigError, match=complaint):
        check_metrics(metrics)
