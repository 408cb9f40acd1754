"""Gradient rounds are data-parallel training: held to a torch loop over the batches of all replicas together."""

from __future__ import annotations

import copy
import logging
from functools import partial

import numpy as np
import pytest
import torch
from plain_loop import epoch_batches
from torch import nn
from twin import deal, facts_of, flat, local_coordinator, make_fit_on, run, schema_of, write_shards

from sparkdeep.errors import ConfigError
from sparkdeep.models.program import Program, inner_optimizer
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.local import LocalStore
from sparkdeep.tracking.records import RoundRecord

ADAM = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)


def module(*middle):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 2)).double()


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 3)), rng.normal(size=(n, 2)), rng.uniform(0.2, 3.0, size=n)


def program(model=None, **given):
    return Program(model=model or module(), loss=nn.MSELoss(), **{"optimizer": torch.optim.SGD, **given})


def batches_of(x, y, w, sizes, digests, *, epochs, size, every):
    """What all replicas see in each round, together."""
    starts = np.cumsum([0, *sizes[:-1]])
    for epoch in range(epochs):
        orders = [epoch_batches(n, size, digest=d, epoch=epoch) for n, d in zip(sizes, digests, strict=True)]
        for first in range(0, max(map(len, orders)), every):
            chosen = np.concatenate(
                [start + b for start, own in zip(starts, orders, strict=True) for b in own[first : first + every]]
            )
            yield torch.from_numpy(x[chosen]), torch.from_numpy(y[chosen]), torch.from_numpy(w[chosen])


def loop(model, batches, optimizer, *, weighted=False, clip=None, scheduler=None):
    steps = optimizer(model.parameters())
    clock = scheduler(steps) if scheduler else None
    for x, y, w in batches:
        steps.zero_grad()
        each = (model(x) - y).square().mean(1)
        ((each * w).sum() / w.sum() if weighted else each.mean()).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        steps.step()
        if clock is not None:
            clock.step()
    return flat(model)


@pytest.mark.identity(3)
@pytest.mark.parametrize("sizes", [[20, 20], [23, 12, 5]])
@pytest.mark.parametrize("every", [1, 3])
def test_gradient_rounds_with_adam_are_exact_data_parallel_training(tmp_path, sizes, every):
    x, y, w = rows(sum(sizes))
    schema = schema_of(x, y)
    paths = write_shards(tmp_path / "shards", deal(x, y, sizes), schema)
    digests = [facts.digest for facts in facts_of(paths)]
    expected = loop(module(), batches_of(x, y, w, sizes, digests, epochs=3, size=4, every=every), ADAM)
    common = {"epochs": 3, "batch_size": 4, "sync_every": every}
    coordinator = local_coordinator()
    try:
        fit = make_fit_on(
            tmp_path, program(), paths, schema, coordinator=coordinator, work="gradient", outer_optimizer=ADAM, **common
        )
        records = list(fit.rounds())
        local = make_fit_on(tmp_path, program(optimizer=ADAM), paths, schema, coordinator=coordinator, **common)
        list(local.rounds())
    finally:
        coordinator.close()
    torch.testing.assert_close(fit.state.parameters.detach(), expected, rtol=0, atol=1e-12)
    assert (local.state.parameters - expected).abs().max() > 1e-3, "averaging Adam's steps is another method"
    assert all(len(record.evaluations) == 1 and not record.evaluations[0].cached for record in records)
    assert all(RoundRecord.from_dict(record.to_dict()) == record for record in records)


def test_row_weights_clipping_and_the_learning_rate_belong_to_the_whole_gradient(tmp_path):
    sizes = [17, 12]
    x, y, w = rows(sum(sizes))
    schema = schema_of(x, y, w)
    paths = write_shards(tmp_path / "shards", deal(x, y, sizes, w), schema)
    digests = [facts.digest for facts in facts_of(paths)]
    halved = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    wanted = partial(loop, weighted=True, clip=0.05, scheduler=halved)
    batches = list(batches_of(x, y, w, sizes, digests, epochs=2, size=4, every=2))
    expected = wanted(module(), batches, ADAM)
    coordinator = local_coordinator()
    try:
        fit = make_fit_on(
            tmp_path,
            program(lr_scheduler=halved),
            paths,
            schema,
            coordinator=coordinator,
            work="gradient",
            outer_optimizer=ADAM,
            epochs=2,
            batch_size=4,
            sync_every=2,
            clip_grad_norm=0.05,
        )
        records = list(fit.rounds())
    finally:
        coordinator.close()
    torch.testing.assert_close(fit.state.parameters.detach(), expected, rtol=0, atol=1e-12)
    without = loop(module(), batches, ADAM, weighted=True, scheduler=halved)
    assert (without - expected).abs().max() > 1e-4
    assert max(record.evaluations[0].gradient_norm for record in records) > 0.05, "recorded before it is clipped"


def test_all_rows_are_seen_in_eval_mode_and_batches_in_train_mode(tmp_path, caplog):
    x, y, _ = rows(21)
    model = module(nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
    with torch.no_grad():
        model[1].running_mean.fill_(0.3)
    oracle = copy.deepcopy(model).eval()
    sgd = partial(torch.optim.SGD, lr=0.1)
    steps = sgd(oracle.parameters())
    for _ in range(3):
        steps.zero_grad()
        nn.functional.mse_loss(oracle(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        steps.step()
    common = {"work": "gradient", "outer_optimizer": sgd, "epochs": 3, "batch_size": 4}
    parts, schema = deal(x, y, [9, 7, 5]), schema_of(x, y)
    with caplog.at_level(logging.WARNING, "sparkdeep"):
        whole, _, fit = run(tmp_path, program(copy.deepcopy(model)), parts, schema, sync_every="epoch", **common)
    torch.testing.assert_close(flat(whole), flat(oracle), rtol=0, atol=1e-13)
    assert torch.equal(fit.state.buffers["1.running_mean"], model[1].running_mean), "to the last bit"
    assert [name for name in ("1 (BatchNorm1d)", "2 (Dropout)") if name in caplog.text] == [
        "1 (BatchNorm1d)",
        "2 (Dropout)",
    ]
    assert "eval mode" in caplog.text
    _, _, fit = run(tmp_path, program(copy.deepcopy(model)), parts, schema, sync_every=2, **common)
    assert not torch.equal(fit.state.buffers["1.running_mean"], model[1].running_mean)


def test_a_replica_that_is_out_of_rows_adds_nothing(tmp_path):
    x, y, _ = rows(20)
    sgd = partial(torch.optim.SGD, lr=0.1)
    common = {"work": "gradient", "outer_optimizer": sgd, "epochs": 2, "batch_size": 4, "sync_every": "epoch"}
    dealt = flat(run(tmp_path, program(), deal(x, y, [20, 0]), schema_of(x, y), **common)[0])
    alone = flat(run(tmp_path, program(), deal(x, y, [20]), schema_of(x, y), **common)[0])
    assert torch.equal(dealt, alone)


def test_the_number_of_replicas_does_not_change_a_gradient_of_all_rows(tmp_path):
    x, y, _ = rows(31)
    common = {"work": "gradient", "outer_optimizer": ADAM, "epochs": 6, "batch_size": 3, "sync_every": "epoch"}
    one = flat(run(tmp_path, program(), deal(x, y, [31]), schema_of(x, y), **common)[0])
    for sizes in ([16, 15], [4, 20, 7]):
        many = flat(run(tmp_path, program(), deal(x, y, sizes), schema_of(x, y), **common)[0])
        torch.testing.assert_close(many, one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("every", [2, "epoch"])
def test_a_run_resumed_from_a_checkpoint_has_the_same_bits(tmp_path, every):
    x, y, _ = rows(22)
    schema = schema_of(x, y)
    paths = write_shards(tmp_path / "shards", deal(x, y, [12, 10]), schema)
    halved = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    common = {"work": "gradient", "outer_optimizer": ADAM, "epochs": 5, "batch_size": 4, "sync_every": every}
    coordinator = local_coordinator()

    def go(checkpoints, stop_after=None):
        started = program(module(nn.Dropout(0.3)).double(), lr_scheduler=halved)
        fit = make_fit_on(
            tmp_path,
            started,
            paths,
            schema,
            coordinator=coordinator,
            checkpoints=checkpoints,
            checkpoint_every=1,
            **common,
        )
        for record in (going := fit.rounds()):
            if record.round == stop_after:
                break
        going.close()
        return fit

    try:
        whole = go(None)
        store = LocalStore(tmp_path / "checkpoints")
        go(CheckpointDirectory(store, identity={}), stop_after=3)
        resumed = go(CheckpointDirectory(store, identity={}))
    finally:
        coordinator.close()
    assert resumed.resumed_from == 3
    assert torch.equal(resumed.state.parameters, whole.state.parameters)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"work": "gradient"}, "work='gradient' without outer_optimizer"),
        ({"outer_optimizer": torch.optim.LBFGS}, "LBFGS with work='local'"),
        ({"outer_optimizer": lambda p: torch.optim.LBFGS(p)}, "LBFGS with work='local'"),
        (
            {"work": "gradient", "outer_optimizer": torch.optim.LBFGS, "sync_every": 4},
            "sync_every=4.*sync_every='epoch'",
        ),
        (
            {"work": "gradient", "outer_optimizer": lambda p: torch.optim.LBFGS(p), "sync_every": 4},
            "sync_every=4.*sync_every='epoch'",
        ),
        (
            {
                "work": "gradient",
                "outer_optimizer": torch.optim.LBFGS,
                "sync_every": "epoch",
                "clip_grad_norm": 1.0,
            },
            "clip_grad_norm=1.0",
        ),
        ({"work": "gradient", "outer_optimizer": ADAM, "codec": "int8"}, "codec='int8'"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_replica_starts(tmp_path, given, message):
    x, y, _ = rows(8)
    coordinator = local_coordinator()
    schema = schema_of(x, y)
    paths = write_shards(tmp_path / "shards", deal(x, y, [8]), schema)
    try:
        with pytest.raises(ConfigError, match=message):
            make_fit_on(tmp_path, program(), paths, schema, coordinator=coordinator, **given)
    finally:
        coordinator.close()


def test_lbfgs_as_a_local_optimizer_is_refused_by_name():
    local = program(optimizer=torch.optim.LBFGS)
    with pytest.raises(ConfigError, match=r"optimizer=LBFGS.*closure.*algorithm=lbfgs"):
        inner_optimizer(local)


def test_the_drivers_schedule_is_not_stepped_on_replicas(tmp_path):
    """One with a fixed number of steps would run over its end on a clock of local steps."""
    x, y, _ = rows(24)
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=4)
    common = {"work": "gradient", "outer_optimizer": ADAM, "epochs": 1, "batch_size": 2, "sync_every": 3}
    _, records, _ = run(tmp_path, program(lr_scheduler=cycle), deal(x, y, [24]), schema_of(x, y), **common)
    assert len(records) == 4
