"""Models of every kind through a whole fit: batch norms, dtypes, tied, frozen and unused parameters."""

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


def table(rows, dtype=np.float32):
    rng = np.random.default_rng(rows)
    return rng.normal(size=(rows, 4)).astype(dtype), rng.normal(size=(rows, 1)).astype(dtype)


MOMENTUM = partial(SGD, lr=0.05, momentum=0.9)


def fit(tmp_path, model, x, y, sizes, *, optimizer=MOMENTUM, **options):
    program = Program(model=model, loss=nn.MSELoss(), optimizer=optimizer)
    options = {"epochs": 2, "batch_size": 8, "sync_every": 2, **options}
    return run(tmp_path, program, deal(x, y, sizes), schema_of(x, y), **options)


def plainly(tmp_path, model, x, y, **options):
    schema, parts = schema_of(x, y), deal(x, y, [len(x)])
    (facts,) = facts_of(write_shards(tmp_path / "for-its-digest", parts, schema))
    options = {"epochs": 2, "batch_size": 8, "optimizer": partial(SGD, lr=0.05, momentum=0.9), **options}
    train_plainly(model, x, y, digest=facts.digest, loss=nn.MSELoss(), **options)
    return model


# -- batch norms ------------------------------------------------------------------------------------------------------


def normed(momentum=0.1):
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=momentum), nn.ReLU(), nn.Linear(6, 1))


@pytest.mark.identity(14)
def test_batch_norm_statistics_are_those_of_the_concatenated_data(tmp_path):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(-3, 1, size=(200, 4)), rng.normal(5, 2, size=(600, 4))])
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=1.0), nn.Linear(4, 1)).double()
    trained, _, _ = fit(tmp_path, model, x, x[:, :1].copy(), [200, 600], epochs=1, batch_size=1000, sync_every=1)
    norm = trained[0]
    np.testing.assert_allclose(norm.running_mean.numpy(), x.mean(0), rtol=1e-12)
    # torch keeps each replica's unbiased variance: n / (n - 1) is all that is left between the two.
    np.testing.assert_allclose(norm.running_var.numpy(), x.var(0), rtol=1 / 199)
    naive = (200 * x[:200].var(0) + 600 * x[200:].var(0)) / 800
    assert (np.abs(norm.running_var.numpy() - naive) > 5).all()


@pytest.mark.parametrize("sizes", [[17, 9], [1, 25], [33, 1], [1, 1]], ids=str)
def test_one_row_tails_and_one_row_shards_do_not_stop_a_batch_norm(tmp_path, sizes):
    x, y = table(sum(sizes))
    trained, records, _ = fit(tmp_path, normed(), x, y, sizes)
    assert torch.isfinite(flat(trained)).all()
    assert sum(record.rows for record in records) == 2 * sum(sizes)
    assert trained[1].num_batches_tracked.dtype == torch.int64
    assert trained[1].num_batches_tracked == (2 * (max(sizes) // 8) if max(sizes) > 1 else 0)


def test_a_batch_norm_of_one_replica_is_that_of_a_plain_loop(tmp_path):
    x, y = table(41)
    torch.manual_seed(0)
    model = normed()
    expected = plainly(tmp_path, copy.deepcopy(model), x, y)
    trained, _, _ = fit(tmp_path, model, x, y, [41])
    for name, value in expected.state_dict().items():
        assert torch.equal(trained.state_dict()[name], value), name


class Flags(nn.Module):
    """Boolean, integer, complex and non-persistent buffers beside a parameter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("phase", torch.tensor([1j, 2.0]))
        self.register_buffer("scale", torch.full((4,), 0.1), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.linear(x * self.mask * self.scale)


@pytest.mark.identity(14)
def test_buffers_of_other_dtypes_survive_and_counters_take_the_maximum(tmp_path):
    x, y = table(40)
    trained, _, _ = fit(tmp_path, Flags(), x, y, [24, 16], epochs=1, sync_every=1)
    assert trained.mask.tolist() == [True, False, True, True]
    assert trained.calls == 3
    assert trained.calls.dtype == torch.int64
    assert trained.phase.tolist() == [1j, 2.0]
    assert torch.equal(trained.scale, torch.full((4,), 0.1))


# -- tied, frozen, unused ---------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 1)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.frozen(torch.relu(self.second(torch.tanh(self.first(x)))))


@pytest.mark.identity(14)
def test_tied_parameters_stay_tied_frozen_ones_frozen_and_unused_ones_as_they_were(tmp_path):
    x, y = table(40)
    torch.manual_seed(0)
    model = Tied()
    before = copy.deepcopy(model)
    trained, _, fitted = fit(tmp_path, model, x, y, [25, 15], optimizer=partial(AdamW, lr=0.01))
    assert trained.second.weight is trained.first.weight
    assert not torch.equal(trained.first.weight, before.first.weight)
    assert torch.equal(trained.frozen.weight, before.frozen.weight)
    assert torch.equal(trained.unused.weight, before.unused.weight)
    names = [entry.name for entry in fitted.layout.entries]
    assert names == ["first.weight", "first.bias", "second.bias", "unused.weight", "unused.bias"]


def test_a_tied_model_on_one_replica_is_a_plain_loop(tmp_path):
    x, y = table(40)
    torch.manual_seed(0)
    model = Tied()
    expected = plainly(tmp_path, copy.deepcopy(model), x, y, optimizer=partial(AdamW, lr=0.01))
    untied = copy.deepcopy(model)
    untied.second.weight = nn.Parameter(model.first.weight.detach().clone())
    plainly(tmp_path, untied, x, y, optimizer=partial(AdamW, lr=0.01))
    trained, _, _ = fit(tmp_path, model, x, y, [40], optimizer=partial(AdamW, lr=0.01))
    assert torch.equal(trained.first.weight, expected.first.weight)
    assert not torch.equal(trained.first.weight, untied.first.weight)


# -- dtypes -----------------------------------------------------------------------------------------------------------


def plain_net(dtype):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_model_keeps_its_dtype(tmp_path, dtype):
    x, y = table(40)
    trained, records, _ = fit(tmp_path, plain_net(dtype), x, y, [25, 15], epochs=6)
    assert {p.dtype for p in trained.parameters()} == {dtype}
    assert records[-1].loss < records[0].loss


class Mixed(nn.Module):
    """A float32 body with a float64 head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 1).double()

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)).double()).float()


def test_mixed_dtypes_train_and_equal_a_plain_loop_on_one_replica(tmp_path):
    x, y = table(40)
    expected = plainly(tmp_path, Mixed(), x, y)
    trained, _, fitted = fit(tmp_path, Mixed(), x, y, [40])
    assert fitted.layout.dtype == torch.float64
    assert torch.equal(trained.body.weight, expected.body.weight)
    assert torch.equal(trained.head.weight, expected.head.weight)
    assert trained.head.weight.dtype == torch.float64


def test_bf16_autocast_is_that_of_a_plain_loop_and_not_float32(tmp_path):
    x, y = table(40)
    expected = plainly(tmp_path, plain_net(torch.float32), x, y, autocast=True)
    in_float32 = plainly(tmp_path, plain_net(torch.float32), x, y)
    trained, _, _ = fit(tmp_path, plain_net(torch.float32), x, y, [40], precision="bf16")
    assert torch.equal(flat(trained), flat(expected))
    assert not torch.equal(flat(trained), flat(in_float32))


# -- state between stages, order of arrival -----------------------------------------------------------------------------


def dropout_net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 1))


@pytest.mark.parametrize("inner_state", ["keep", "average", "reset"])
@pytest.mark.parametrize("replica_state", ["local", "durable"])
def test_a_stage_for_every_round_gives_the_bits_of_one_stage_for_all(tmp_path, inner_state, replica_state):
    x, y = table(60)
    options = {"optimizer": partial(AdamW, lr=0.01), "inner_state": inner_state, "replica_state": replica_state}
    together, _, _ = fit(tmp_path, dropout_net(), x, y, [35, 25], **options)
    apart, records, _ = fit(tmp_path, dropout_net(), x, y, [35, 25], rounds_per_stage=1, **options)
    assert torch.equal(flat(together), flat(apart))
    assert all(record.stage_seconds > 0 for record in records)
    assert not any(record.state_reset for record in records)


def test_keeping_averaging_and_resetting_inner_state_are_three_different_things(tmp_path):
    x, y = table(60)
    results = [
        flat(fit(tmp_path, dropout_net(), x, y, [35, 25], optimizer=partial(AdamW, lr=0.01), inner_state=kind)[0])
        for kind in ("keep", "average", "reset")
    ]
    for i in range(3):
        assert not torch.equal(results[i], results[i - 1])


class SlowFor:
    """Sleeps where a batch holds rows of one shard, so that its replica is the last to arrive."""

    def __init__(self, mark):
        self.mark = mark

    def __call__(self, features):
        import time

        if features[0, 0] == self.mark:
            time.sleep(0.02)
        return features


@pytest.mark.fault(rows=[11], phases="TR")
def test_who_arrives_first_changes_not_a_bit(tmp_path):
    x, y = table(48)
    x[:, 0] = np.repeat([0.0, 1.0, 2.0], 16)
    results = []
    for slow in (None, 0.0, 1.0, 2.0):
        program = Program(
            model=dropout_net(),
            loss=nn.MSELoss(),
            optimizer=partial(AdamW, lr=0.01),
            preprocess=None if slow is None else SlowFor(slow),
        )
        options = {"epochs": 2, "batch_size": 8, "sync_every": 1}
        model, _, _ = run(tmp_path, program, deal(x, y, [16, 16, 16]), schema_of(x, y), **options)
        results.append(flat(model))
    assert all(torch.equal(results[0], other) for other in results[1:])
