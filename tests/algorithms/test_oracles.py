"""Training held to what anyone can write down: a plain torch loop, and full-batch gradient descent."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from plain_loop import train_plainly
from torch import nn
from torch.optim import SGD, AdamW
from twin import deal, facts_of, flat, run, schema_of, write_shards

from sparkdeep.models.program import Program

MSE = nn.MSELoss()


def net(dtype=torch.float32, dropout=0.3):
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 1)).to(dtype)


def table(rows, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 5)).astype(dtype)
    y = (x @ rng.normal(size=(5, 1)) + 0.1 * rng.normal(size=(rows, 1))).astype(dtype)
    return x, y


def digest_of(tmp_path, parts, schema):
    (facts,) = facts_of(write_shards(tmp_path / "for-its-digest", parts, schema))
    return facts.digest


ADAMW = partial(AdamW, lr=0.01)


def one_replica_and_plain_loop(
    tmp_path, *, dtype=np.float32, optimizer=ADAMW, scheduler=None, clip=None, accumulate=1, **options
):
    """Train 43 rows in batches of 8 (the last is short) for 3 epochs, both ways; returns both and the records."""
    x, y = table(43, dtype)
    schema, parts = schema_of(x, y), deal(x, y, [43])
    model = net(torch.from_numpy(x).dtype)
    expected = copy.deepcopy(model)
    plain_seed = options.pop("plain_seed", 5)
    losses = train_plainly(
        expected,
        x,
        y,
        digest=digest_of(tmp_path, parts, schema),
        loss=MSE,
        optimizer=optimizer,
        epochs=3,
        batch_size=8,
        seed=plain_seed,
        accumulate=accumulate,
        clip=clip,
        scheduler=scheduler,
    )
    program = Program(model=model, loss=MSE, optimizer=optimizer, lr_scheduler=scheduler)
    trained, records, _ = run(
        tmp_path,
        program,
        parts,
        schema,
        epochs=3,
        batch_size=8,
        seed=5,
        accumulate_batches=accumulate,
        clip_grad_norm=clip,
        **{"sync_every": 1, **options},
    )
    return trained, expected, records, losses


def same_bits(a, b):
    return torch.equal(flat(a), flat(b))


@pytest.mark.identity(1)
@pytest.mark.parametrize("sync_every", [1, 3, "epoch"])
@pytest.mark.parametrize(
    "optimizer",
    [partial(SGD, lr=0.05, momentum=0.9), partial(AdamW, lr=0.01)],
    ids=["sgd-momentum", "adamw"],
)
def test_one_replica_is_a_plain_loop_to_the_last_bit(tmp_path, sync_every, optimizer):
    trained, expected, records, losses = one_replica_and_plain_loop(
        tmp_path, optimizer=optimizer, sync_every=sync_every
    )
    assert same_bits(trained, expected)
    assert sum(record.rows for record in records) == 3 * 43
    assert len(losses) == 3 * 6


@pytest.mark.parametrize(
    "setting",
    [
        {"scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=4, gamma=0.5)},
        {"scheduler": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.02, total_steps=19)},
        {"clip": 0.05},
        {"accumulate": 2},
        {"accumulate": 4, "clip": 0.1, "sync_every": "epoch"},
        {"dtype": np.float64},
        {"dtype": np.float64, "sync_every": 3},
        {"inner_state": "average", "sync_every": 2},
        {"rounds_per_stage": 1, "sync_every": 2},
    ],
    ids=str,
)
def test_one_replica_is_a_plain_loop_with_every_setting(tmp_path, setting):
    trained, expected, _, _ = one_replica_and_plain_loop(tmp_path, **setting)
    assert same_bits(trained, expected)


def test_the_comparison_with_the_plain_loop_can_fail(tmp_path):
    other_dropout, expected, _, _ = one_replica_and_plain_loop(tmp_path, plain_seed=6)
    assert not same_bits(other_dropout, expected)
    without_state, expected, _, _ = one_replica_and_plain_loop(tmp_path / "reset", inner_state="reset")
    assert not same_bits(without_state, expected)


def test_the_record_holds_the_row_weighted_training_loss(tmp_path):
    _, _, records, losses = one_replica_and_plain_loop(tmp_path, sync_every="epoch", dtype=np.float64)
    sizes = np.array([8, 8, 8, 8, 8, 3])
    for record, part in zip(records, np.array(losses).reshape(3, 6), strict=True):
        assert record.loss == pytest.approx((part * sizes).sum() / 43, rel=1e-14)


# -- many replicas, one step a round: gradient descent on all rows ------------------------------------------------

SGDS = {
    "plain": partial(SGD, lr=0.05),
    "momentum": partial(SGD, lr=0.05, momentum=0.9),
    "nesterov": partial(SGD, lr=0.05, momentum=0.9, nesterov=True),
    "weight-decay": partial(SGD, lr=0.05, momentum=0.5, weight_decay=0.1),
}


def descend(model, x, y, optimizer, steps, row_weights=None):
    opt = optimizer(list(model.parameters()))
    weights = torch.ones(len(x), dtype=torch.float64) if row_weights is None else torch.from_numpy(row_weights)
    for _ in range(steps):
        opt.zero_grad()
        per_row = (model(torch.from_numpy(x)) - torch.from_numpy(y)).square().mean(1)
        ((per_row * weights).sum() / weights.sum()).backward()
        opt.step()
    return model


def replicas(tmp_path, sizes, optimizer, *, row_weights=None, loss=MSE, **options):
    x, y = table(sum(sizes), np.float64)
    model = net(torch.float64, dropout=0.0)
    start = copy.deepcopy(model)
    program = Program(model=model, loss=loss, optimizer=optimizer)
    options = {"epochs": 20, "batch_size": 64, "sync_every": 1, **options}
    parts = deal(x, y, sizes, row_weights)
    trained, records, _ = run(tmp_path, program, parts, schema_of(x, y, row_weights), **options)
    return trained, start, x, y, records


def distance(a, b):
    return float((flat(a) - flat(b)).abs().max())


@pytest.mark.identity(3)
@pytest.mark.parametrize("sizes", [[20, 20], [7, 40], [10, 30, 24], [16, 16, 16]], ids=str)
@pytest.mark.parametrize("kind", SGDS)
def test_full_batches_averaged_every_step_are_gradient_descent_on_all_rows(tmp_path, sizes, kind):
    trained, start, x, y, records = replicas(tmp_path, sizes, SGDS[kind])
    expected = descend(copy.deepcopy(start), x, y, SGDS[kind], 20)
    assert len(records) == 20
    assert distance(trained, start) > 0.01
    assert distance(trained, expected) < 1e-12


@pytest.mark.identity(3)
def test_gradient_descent_survives_averaged_inner_state_but_not_a_reset_one(tmp_path):
    momentum = SGDS["momentum"]
    averaged, start, x, y, _ = replicas(tmp_path, [10, 30, 24], momentum, inner_state="average")
    expected = descend(copy.deepcopy(start), x, y, momentum, 20)
    assert distance(averaged, expected) < 1e-12
    reset, _, _, _, _ = replicas(tmp_path, [10, 30, 24], momentum, inner_state="reset")
    assert distance(reset, expected) > 1e-3
    without_momentum = descend(copy.deepcopy(start), x, y, SGDS["plain"], 20)
    assert distance(reset, without_momentum) < 1e-12


def test_a_short_batch_counts_for_less_when_batches_accumulate(tmp_path):
    at_once, start, x, y, _ = replicas(tmp_path, [43], SGDS["momentum"])
    in_parts, _, _, _, _ = replicas(tmp_path, [43], SGDS["momentum"], batch_size=8, accumulate_batches=6)
    assert distance(at_once, in_parts) < 1e-12
    assert distance(at_once, descend(copy.deepcopy(start), x, y, SGDS["momentum"], 20)) < 1e-12
    smaller, _, _, _, _ = replicas(tmp_path, [43], SGDS["momentum"], batch_size=8, accumulate_batches=5)
    assert distance(at_once, smaller) > 1e-4


# -- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.identity(4)
@pytest.mark.fault(rows=[29], phases="TR")
def test_uneven_shards_weigh_their_rows(tmp_path):
    sizes = [10, 30, 24]
    options = {"epochs": 1, "batch_size": 8, "sync_every": "epoch"}
    mean, _, x, y, (record,) = replicas(tmp_path, sizes, SGDS["plain"], **options)
    alone = []
    for part in deal(x, y, sizes):
        program = Program(model=net(torch.float64, 0.0), loss=MSE, optimizer=SGDS["plain"])
        alone.append(flat(run(tmp_path, program, [part], schema_of(x, y), **options)[0]))
    by_rows = sum(n * vector for n, vector in zip(sizes, alone, strict=True)) / sum(sizes)
    torch.testing.assert_close(flat(mean), by_rows, rtol=1e-15, atol=1e-16)
    assert float((flat(mean) - sum(alone) / 3).abs().max()) > 1e-4
    assert [part.weight for part in record.replicas] == sizes


def test_a_replica_that_is_out_of_rows_weighs_nothing_and_each_row_counts_once_an_epoch(tmp_path):
    _, _, _, _, records = replicas(tmp_path, [4, 20, 9], SGDS["plain"], epochs=3, batch_size=4, sync_every=2)
    assert [record.rows for record in records if record.epoch == 2] == [4 + 8 + 9, 8, 4]
    assert [part.weight for part in records[2].replicas] == [0, 4, 0]
    for epoch in (1, 2, 3):
        assert sum(record.rows for record in records if record.epoch == epoch) == 33


@pytest.mark.identity(4)
@pytest.mark.fault(rows=[27], phases="LD")
def test_an_empty_shard_changes_nothing(tmp_path):
    with_empty, start, x, y, records = replicas(tmp_path, [20, 0, 13], SGDS["momentum"])
    assert distance(with_empty, descend(copy.deepcopy(start), x, y, SGDS["momentum"], 20)) < 1e-12
    assert {part.weight for record in records for part in record.replicas if part.replica == 1} == {0}


@pytest.mark.parametrize("loss", [MSE, nn.SmoothL1Loss(beta=1e-9)], ids=["mse", "smooth-l1"])
def test_a_row_of_weight_two_is_that_row_twice(tmp_path, loss):
    x, y = table(24, np.float64)
    weights = np.ones(24)
    weights[[3, 17]] = 2.0
    twice = np.concatenate([np.arange(13), [3], np.arange(13, 24), [17]])
    results = []
    for rows, w, sizes in [(np.arange(24), weights, [13, 11]), (twice, None, [14, 12])]:
        program = Program(model=net(torch.float64, 0.0), loss=loss, optimizer=SGDS["momentum"])
        parts = deal(x[rows], y[rows], sizes, w)
        options = {"epochs": 5, "batch_size": 64, "sync_every": 1}
        model, records, _ = run(tmp_path, program, parts, schema_of(x, y, w), **options)
        assert [part.weight for part in records[0].replicas] == [14.0, 12.0]
        results.append(model)
    assert distance(*results) < 1e-12


def test_weights_of_rows_are_followed_and_ignoring_them_would_show(tmp_path):
    weights = np.random.default_rng(3).uniform(0.0, 3.0, size=40)
    trained, start, x, y, _ = replicas(tmp_path, [15, 25], SGDS["momentum"], row_weights=weights)
    assert distance(trained, descend(copy.deepcopy(start), x, y, SGDS["momentum"], 20, weights)) < 1e-12
    assert distance(trained, descend(copy.deepcopy(start), x, y, SGDS["momentum"], 20)) > 1e-3
