"""Scores summed on replicas and merged on the driver equal scores of all rows at once."""

from __future__ import annotations

import collections
import dataclasses
import math

import pytest
import torch
import torchmetrics
from sklearn.metrics import roc_auc_score
from torch import nn

from sparkdeep.data.batches import Batch
from sparkdeep.errors import ConfigError, UserCodeError
from sparkdeep.models import scored_rows
from sparkdeep.models.losses import LossFunction
from sparkdeep.models.program import Program
from sparkdeep.models.scored_rows import ScoredRows, check_room
from sparkdeep.models.validation import Evaluator, check_metrics, merge_scores, try_metric
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


def auc(output, label):
    return roc_auc_score(label, output) if 0 < label.sum() < len(label) else 0.5


def rmse(output, label):
    return (output - label).square().mean().sqrt()


def precision(output, label):
    chosen = output > 1
    return (label[chosen] == 1).double().mean()


@pytest.mark.parametrize("shares", [[600], [1, 599], [300, 0, 300], [200, 200, 200]], ids=str)
@pytest.mark.parametrize("function", [auc, rmse, precision])
def test_a_function_is_given_all_rows_of_all_replicas(function, shares):
    generator = torch.Generator().manual_seed(2)
    label = (torch.rand(600, generator=generator) < 0.05).double()
    output = torch.randn(600, generator=generator, dtype=torch.float64) + 1.5 * label
    merged = scores(output, label, {"m": function}, shares=shares, loss=nn.MSELoss())
    exact = float(function(output, label))
    assert merged["m"] == pytest.approx(exact, rel=1e-12)
    by_batch = torch.stack(
        [torch.as_tensor(function(o, y)) for o, y in zip(output.split(8), label.split(8), strict=True)]
    )
    assert not abs(float(by_batch.double().mean()) - exact) < 0.01, "the mean over batches is another number"


class Named(dict):
    """As transformers' outputs: a mapping with attributes and places."""


@dataclasses.dataclass
class Heads:
    price: torch.Tensor
    risk: torch.Tensor


FORMS = {
    "dict": lambda x: {"price": x[:, 0], "risk": x[:, 1]},
    "subclass of dict": lambda x: Named(price=x[:, 0], risk=x[:, 1]),
    "dataclass": lambda x: Heads(x[:, 0], x[:, 1]),
    "named tuple": lambda x: collections.namedtuple("Pair", "price risk")(x[:, 0], x[:, 1]),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_of_many_heads_has_metrics_of_its_own(form):
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(3))
    labels = {"price": torch.arange(20.0), "risk": torch.arange(20) % 2}

    def loss(output, label):
        price = output["price"] if isinstance(output, dict) else output.price
        return (price - label["price"]).square().mean()

    metrics = {
        "mae": ("price", torchmetrics.MeanAbsoluteError()),
        "error": ("price", rmse),
        "of all": lambda output, label: (output["risk"] + output.price + output[0]).sum() + label["risk"].sum(),
    }
    program = Program(model=nn.Identity(), loss=loss, optimizer=torch.optim.SGD, metrics=metrics)
    parts = []
    for rows in (slice(0, 12), slice(12, 20)):
        evaluator = Evaluator(LossFunction(program, weighted=False), metrics, has_step=False)
        own = {name: column[rows] for name, column in labels.items()}

        class Net(nn.Module):
            def forward(self, features):
                return FORMS[form](features)

        evaluator.add(Net(), Batch(features=x[rows], labels=own, weights=None, rows=rows.stop - rows.start))
        parts.append(unpack(pack(evaluator.scores())))
    merged = merge_scores(parts, metrics)
    assert merged["mae"] == pytest.approx((x[:, 0] - labels["price"]).abs().mean().item(), rel=1e-6)
    assert merged["error"] == pytest.approx(rmse(x[:, 0], labels["price"]).item(), rel=1e-6)
    assert merged["of all"] == pytest.approx((x[:, 1] + 2 * x[:, 0]).sum().item() + 10, rel=1e-5)


def test_what_cannot_be_gathered_is_refused_with_a_remedy(monkeypatch):
    rows = ScoredRows()
    rows.add(torch.zeros(2, 3), None)
    rows.add(torch.zeros(2, 4), None)
    with pytest.raises(ConfigError, match=r"shapes after the rows are \['\(3,\)', '\(4,\)'\].*Pad them"):
        rows.taken()
    with pytest.raises(ConfigError, match=r"hold a set.*torchmetrics"):
        rows.add({"x": {1}}, None)
    with pytest.raises(ConfigError, match=r"the output 'z'; the model's outputs are \['x'\]"):
        try_metric("m", ("z", rmse), {"x": torch.zeros(2)}, torch.zeros(2))
    monkeypatch.setattr(scored_rows, "MOST_BYTES", 1 << 20)
    check_room(torch.zeros(2, 3), torch.zeros(2), 2, (1 << 20) // 16)
    with pytest.raises(ConfigError, match=r"65537 validation rows .* at most 1 are gathered.*torchmetrics"):
        check_room(torch.zeros(2, 3), torch.zeros(2), 2, (1 << 20) // 16 + 1)
    with pytest.raises(ConfigError, match=r"more than 1 MiB"):
        ScoredRows().add(torch.zeros(1 << 20), None)


def test_a_function_that_raises_on_all_rows_has_its_traceback():
    x, y = rows()
    with pytest.raises(UserCodeError, match=r"^Traceback[\s\S]*metric 'm' raised ZeroDivisionError.*float32 \(57, 3\)"):
        scores(x, y, {"m": lambda o, t: 1 / 0}, shares=[20, 37])


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
