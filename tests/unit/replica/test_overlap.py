"""`overlap=1`: a round late, and otherwise what the recurrence says, whatever happens between rounds."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from twin import deal, flat, run, schema_of
from twin_faults import Plan, lost

from sparkdeep.models.program import Program
from sparkdeep.replica.overlapping import Pace

SIZES = [12, 20]
STEPS, EPOCHS, BATCH = 2, 6, 64


def table(features=3):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(SIZES), features))
    return x, x @ rng.normal(size=(features, 1)) + 0.1 * rng.normal(size=(sum(SIZES), 1))


def program(optimizer=None, model=None):
    torch.manual_seed(1)
    return Program(
        model=model or nn.Linear(3, 1).double(), loss=nn.MSELoss(), optimizer=optimizer or partial(SGD, lr=0.1)
    )


def fitted(tmp_path, own=None, sizes=SIZES, **options):
    x, y = table()
    settings = {"epochs": EPOCHS, "batch_size": BATCH, "sync_every": 1, "overlap": 1, **options}
    return run(tmp_path, own or program(), deal(x, y, sizes), schema_of(x, y), **settings)


def recurrence(rounds, mix=None, outer=None, momentum=0.0, late=True):
    """Overlapped averaging written out: full-batch steps on each replica's rows, in float64.

    x_i(t) starts from g(t-2) + d_i(t-1); d_i(t) is what it then changes; g(t) = g(t-1) + mean of d_i(t), or an outer step.
    """
    x, y = map(torch.from_numpy, table())
    parts = list(zip(x.split(SIZES), y.split(SIZES), strict=True))
    template = program().model
    models = [copy.deepcopy(template) for _ in parts]
    optimizers = [SGD(m.parameters(), lr=0.1, momentum=momentum) for m in models]
    known = [flat(template)]  # g(0), g(1), ...
    pending, own = [None] * len(parts), [None] * len(parts)
    velocity = torch.zeros_like(known[0])
    for t in range(1, rounds + 1):
        before = known[max(t - 2, 0)] if late else known[t - 1]
        changes = []
        for i, (model, (px, py)) in enumerate(zip(models, parts, strict=True)):
            if pending[i] is None or not late:
                start = before
            elif mix is None:
                start = before + pending[i]
            else:
                start = mix * own[i] + (1 - mix) * before
            nn.utils.vector_to_parameters(start.clone(), model.parameters())
            optimizers[i].zero_grad()
            nn.functional.mse_loss(model(px), py).backward()
            optimizers[i].step()
            own[i] = flat(model)
            pending[i] = own[i] - start
            changes.append(pending[i])
        mean = sum(n * d for n, d in zip(SIZES, changes, strict=True)) / sum(SIZES)
        if outer is None:
            known.append(known[-1] + mean)
        else:  # SGD with Nesterov momentum on minus the mean change
            rate, inertia = outer
            velocity = inertia * velocity - mean
            known.append(known[-1] - rate * (-mean + inertia * velocity))
    return known[-1]


@pytest.mark.parametrize("mix", [None, 0.5, 1.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_overlap_is_its_recurrence(tmp_path, mix, momentum):
    own = program(partial(SGD, lr=0.1, momentum=momentum))
    model, records, _ = fitted(tmp_path, own, overlap_mix=mix)
    expected = recurrence(len(records), mix=mix, momentum=momentum)
    torch.testing.assert_close(flat(model), expected, rtol=0, atol=1e-13)
    in_time = recurrence(len(records), momentum=momentum, late=False)
    assert (flat(model) - in_time).abs().max() > 1e-4  # the negative control: what is not late differs


def test_overlap_with_an_outer_optimizer_steps_on_the_progress_of_each_round_once(tmp_path):
    outer = partial(SGD, lr=0.7, momentum=0.9, nesterov=True)
    model, records, _ = fitted(tmp_path, outer_optimizer=outer)
    torch.testing.assert_close(flat(model), recurrence(len(records), outer=(0.7, 0.9)), rtol=0, atol=1e-13)


def test_with_one_replica_nothing_is_late(tmp_path):
    def options():
        return {"sizes": [sum(SIZES)], "own": program(partial(AdamW, lr=0.05))}

    ahead, _, _ = fitted(tmp_path, **options())
    plain, _, _ = fitted(tmp_path, **options(), overlap=0)
    torch.testing.assert_close(flat(ahead), flat(plain), rtol=0, atol=1e-12)


def dropping():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 1)).double()
    return program(partial(AdamW, lr=0.02), model)


SMALL = {"batch_size": 4, "sync_every": 2, "epochs": 3}


@pytest.mark.parametrize(
    "disturbance",
    [
        {"rounds_per_stage": 1},
        {"rounds_per_stage": 2, "replica_state": "durable", "checkpoint_every": 1},
        {"replica_state": "durable", "checkpoint_every": 3},
        {"overlap_fragments": 3},
    ],
    ids=["a stage a round", "durable", "snapshots", "fragments"],
)
def test_not_a_bit_depends_on_what_comes_between_rounds(tmp_path, disturbance):
    undisturbed, records, _ = fitted(tmp_path, dropping(), **SMALL)
    disturbed, _, _ = fitted(tmp_path, dropping(), **SMALL, **disturbance)
    assert torch.equal(flat(undisturbed), flat(disturbed))
    names = dict(undisturbed.named_buffers())
    assert all(torch.equal(names[name], value) for name, value in disturbed.named_buffers())
    assert len(records) > 4


def test_validation_between_rounds_changes_nothing(tmp_path):
    x, y = table()
    held = {"validation": [{"features": x[:5], "label": y[:5]}] * 2}
    undisturbed, once, _ = fitted(tmp_path, dropping(), **SMALL, **held, validate_every=1000)
    scored, records, _ = fitted(tmp_path, dropping(), **SMALL, **held, validate_every=2)
    assert torch.equal(flat(undisturbed), flat(scored))
    assert sum(bool(record.metrics) for record in records) > sum(bool(record.metrics) for record in once)


def test_a_stage_that_closes_while_the_next_round_is_trained_undoes_what_was_begun(tmp_path):
    from twin import local_coordinator, make_fit

    from sparkdeep.rounds.fit import Fit

    undisturbed, records, _ = fitted(tmp_path, dropping(), **SMALL)
    x, y = table()
    coordinator = local_coordinator()
    try:
        fit: Fit = make_fit(
            tmp_path, dropping(), deal(x, y, SIZES), schema_of(x, y), coordinator=coordinator, overlap=1, **SMALL
        )
        rounds = fit.rounds()
        for record in rounds:
            if record.round in (2, 5):
                fit.close_stage()  # as a callback does that needs the slots: nobody announced it
        fit.load_result()
    finally:
        coordinator.close()
    assert torch.equal(flat(undisturbed), flat(fit.program.model))
    assert len(records) == len(fit.state.records)


def test_a_replica_lost_in_mid_round_costs_no_bit(tmp_path):
    x, y = table()
    x[:, 0] = np.repeat([0.0, 1.0], SIZES)
    parts, schema = deal(x, y, SIZES), schema_of(x, y)
    options = {**SMALL, "overlap": 1, "rounds_per_stage": 100}
    undisturbed, _, _ = run(tmp_path, dropping(), parts, schema, **options)

    plan = Plan({(1, 7): lost("the executor went away")})
    own = dataclasses.replace(dropping(), augment=plan.hook())
    repeated, records, _ = run(tmp_path, own, parts, schema, wrap=plan.wrap, **options)
    assert torch.equal(flat(undisturbed), flat(repeated))
    assert sum(record.retries for record in records) == 1
    assert plan.launches == 2


def test_fragments_wait_for_their_share_of_the_steps():
    pace = Pace(4)
    pieces = pace.spread(iter(range(8)), 8, inwards=False)
    pace.reach(0.0)
    assert list(itertools.islice(pieces, 2)) == [0, 1]  # the first fragment goes at once
    pace.reach(1 / 8)
    assert list(itertools.islice(pieces, 2)) == [2, 3]
    pace.reach(3 / 8)
    assert list(pieces) == [4, 5, 6, 7]
    late = pace.spread(iter("ab"), 2, inwards=True)
    pace.reach(1.0)
    assert list(late) == ["a", "b"]
