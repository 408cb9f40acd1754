"""What unequal numbers of steps do to the mean, and FedNova's correction, held to written-out recurrences."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from twin import deal, flat, run, schema_of

from sparkdeep.models.program import Program
from sparkdeep.optim.averaging import shares_of
from sparkdeep.protocol.messages import Update
from sparkdeep.tensors.mean import OrderedSum

ROWS = [4, 10, 22]  # one row a batch: 4, 10 and 22 steps an epoch


def update(rows, steps, weight=None):
    told = Update.absent(1)
    values = {name: getattr(told, name) for name in told.__slots__}
    return Update(**{**values, "rows": rows, "steps": steps, "weight": float(rows if weight is None else weight)})


def test_equal_steps_are_the_mean_by_rows_to_the_bit():
    updates = [update(8, 4), update(6, 4), update(0, 0)]
    assert shares_of(updates, [80, 60, 5], "fednova") == shares_of(updates, [80, 60, 5], "rows")
    assert shares_of(updates, [80, 60, 5], "rows").weights == (4.0, 3.0, 0.0)


def test_equal_steps_are_no_exception_from_nearly_equal_ones():
    rows = [1000, 9000]
    equal = shares_of([update(100, 5), update(100, 5)], rows, "fednova")
    assert [weight / equal.divisor for weight in equal.weights] == pytest.approx([0.1, 0.9])
    nearly = shares_of([update(100_000, 5000), update(100_020, 5001)], rows, "fednova")
    assert nearly.weights == pytest.approx([0.1, 0.9], rel=1e-3)
    assert shares_of([update(100, 5), update(100, 5)], rows, "rows").weights == (1.0, 1.0), "by what was trained on"


def test_the_shares_are_the_papers():
    steps, rows = [2, 5, 11], [200, 300, 500]
    shares = shares_of([update(10 * s, s) for s in steps], rows, "fednova")
    p = np.array(rows) / sum(rows)
    effective = float(p @ steps)
    np.testing.assert_allclose(shares.weights, p * effective / steps, rtol=1e-15)
    assert shares.divisor == 1.0
    assert shares.rest == pytest.approx(1.0 - sum(shares.weights), abs=1e-15)


def test_a_sum_adds_its_share_of_where_the_round_began():
    rng = np.random.default_rng(0)
    x, start = torch.from_numpy(rng.normal(size=(3, 7))), torch.from_numpy(rng.normal(size=7))
    weights = [0.3, 0.9, 0.1]
    total = OrderedSum(7, weights, divisor=1.0, base=start, base_share=1.0 - sum(weights), chunk=3)
    for i in range(3):
        total.add(i, lambda a, b, i=i: x[i, a:b], lambda: None)
    expected = start + sum(w * (row - start) for w, row in zip(weights, x, strict=True))
    torch.testing.assert_close(total.mean(), expected, rtol=0, atol=1e-14)


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        return self.at.expand(len(x), -1) - x  # a quadratic with its least value at x


def targets():
    centers = np.array([[4.0, 0.0], [0.0, -2.0], [-1.0, 1.0]])
    return np.repeat(centers, ROWS, axis=0), centers


def trained(tmp_path, weighting, lr, rounds=1, codec="identity"):
    x, _ = targets()
    own = Program(model=Point(), loss=lambda output, label: (output**2).sum() / 2, optimizer=partial(SGD, lr=lr))
    y = np.zeros((len(x), 1))
    _, records, _ = run(
        tmp_path, own, deal(x, y, ROWS), schema_of(x, y), epochs=rounds, batch_size=1, sync_every="epoch", weighting=weighting,
        codec=codec,
    )  # fmt: skip
    assert [p.steps for p in records[0].replicas] == ROWS
    return flat(own.model).numpy()


def recurrence(weighting, lr, rounds):
    """Written out: each replica takes as many gradient steps on its own quadratic as it has rows."""
    _, centers = targets()
    p, at = np.array(ROWS) / sum(ROWS), np.zeros(2)
    for _ in range(rounds):
        ends = []
        for center, steps in zip(centers, ROWS, strict=True):
            own = at.copy()
            for _ in range(steps):
                own -= lr * (own - center)
            ends.append(own)
        if weighting == "rows":
            at = p @ np.array(ends)
        else:
            moves = np.array([(end - at) / steps for end, steps in zip(ends, ROWS, strict=True)])
            at = at + float(p @ np.array(ROWS)) * (p @ moves)
    return at


@pytest.mark.identity(8)
@pytest.mark.parametrize("weighting", ["rows", "fednova"])
def test_replicas_with_unequal_steps_follow_the_recurrence(tmp_path, weighting):
    got = trained(tmp_path, weighting, 0.02, rounds=5)
    np.testing.assert_allclose(got, recurrence(weighting, 0.02, 5), rtol=0, atol=1e-12)
    other = recurrence("rows" if weighting == "fednova" else "fednova", 0.02, 5)
    assert np.abs(got - other).max() > 1e-3


@pytest.mark.identity(8)
def test_the_bias_of_the_corrected_mean_vanishes_with_the_rate_and_the_plain_ones_stays():
    _, centers = targets()
    optimum = np.array(ROWS) / sum(ROWS) @ centers
    error = {
        (w, lr): np.linalg.norm(recurrence(w, lr, int(400 / lr / 20)) - optimum)
        for w in ("rows", "fednova")
        for lr in (0.02, 0.002)
    }
    assert error["fednova", 0.002] < 0.2 * error["fednova", 0.02]
    assert error["rows", 0.002] > 0.7 * error["rows", 0.02]


def test_differences_that_a_code_rounds_are_corrected_alike(tmp_path):
    got = trained(tmp_path, "fednova", 0.02, rounds=3, codec="bf16")
    np.testing.assert_allclose(got, recurrence("fednova", 0.02, 3), rtol=0, atol=0.02)
