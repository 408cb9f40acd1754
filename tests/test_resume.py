"""A run that is stopped and resumed from its checkpoint is the undisturbed run."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from faults import Plan, marked_table
from torch import nn
from torch.optim import SGD, AdamW
from twin import deal, flat, local_coordinator, make_fit, schema_of

from sparkdeep.checkpoint import CheckpointDirectory
from sparkdeep.config import EarlyStopping
from sparkdeep.errors import CheckpointError
from sparkdeep.program import Program
from sparkdeep.store import LocalStore
from sparkdeep.trees import pack, unpack

SIZES = [22, 14]
X, Y = marked_table(SIZES)
NESTEROV = partial(SGD, lr=0.7, momentum=0.9, nesterov=True)


def program():
    torch.manual_seed(3)
    return Program(
        model=nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 1)),
        loss=nn.MSELoss(),
        optimizer=partial(AdamW, lr=0.01),
        lr_scheduler=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.02, total_steps=13),
    )


def directory(path, **identity):
    return CheckpointDirectory(LocalStore(path), identity=identity)


def go(tmp_path, checkpoints, *, stop_after=None, **options):
    """Run rounds until the end, or abandon the generator after `stop_after`; returns parameters and records."""
    coordinator = local_coordinator()
    rows = marked_table([6, 6])
    try:
        fit = make_fit(
            tmp_path,
            program(),
            deal(X, Y, SIZES),
            schema_of(X, Y),
            validation=deal(*rows, [6, 6]),
            coordinator=coordinator,
            checkpoints=checkpoints,
            **{"epochs": 2, "batch_size": 4, "sync_every": 2, "outer_optimizer": NESTEROV, **options},
        )
        rounds = fit.rounds()
        for record in rounds:
            if record.round == stop_after:
                break
        rounds.close()
        fit.load_result()
        values = torch.cat([flat(fit.program.model), fit.program.model[1].running_var])
        return values, fit.state.records, fit
    finally:
        coordinator.close()


def essence(records):
    return [(r.round, r.epoch, r.rows, r.loss, r.metrics) for r in records]


@pytest.mark.parametrize("replica_state", ["local", "durable"])
@pytest.mark.parametrize("checkpoint_every", [1, 3])
@pytest.mark.parametrize("stop_after", [1, 3, 4, 5])
def test_a_run_resumed_after_some_rounds_equals_the_undisturbed_one(
    tmp_path, stop_after, checkpoint_every, replica_state
):
    expected, records, _ = go(tmp_path, None)
    options = {"checkpoint_every": checkpoint_every, "replica_state": replica_state}
    store = tmp_path / "checkpoints"
    go(tmp_path, directory(store), stop_after=stop_after, **options)
    values, resumed, fit = go(tmp_path, directory(store), **options)
    assert fit.resumed_from == stop_after - stop_after % checkpoint_every
    assert torch.equal(values, expected)
    assert essence(resumed) == essence(records)
    assert not any(r.state_reset for r in resumed)


@pytest.mark.parametrize("inner_state", ["average", "reset"])
def test_every_kind_of_inner_state_resumes_to_the_same_bits(tmp_path, inner_state):
    expected, _, _ = go(tmp_path, None, inner_state=inner_state)
    go(tmp_path, directory(tmp_path / "c"), stop_after=3, checkpoint_every=1, inner_state=inner_state)
    values, _, _ = go(tmp_path, directory(tmp_path / "c"), checkpoint_every=1, inner_state=inner_state)
    assert torch.equal(values, expected)


class Forgetful:
    """A checkpoint directory that loses a part on the way back."""

    def __init__(self, inner, lose):
        self.save, self._inner, self._lose = inner.save, inner, lose

    def latest(self):
        loaded = self._inner.latest()
        files = dict(loaded.files)
        self._lose(files)
        return dataclasses.replace(loaded, files=files)


def lose_outer_momentum(files):
    run = unpack(files["run.safetensors"])
    run["outer"]["state"] = {}
    files["run.safetensors"] = pack(run)


def lose_a_replica(files):
    del files["replica-00001.safetensors"]


@pytest.mark.parametrize("lose", [lose_outer_momentum, lose_a_replica])
def test_what_a_checkpoint_holds_matters(tmp_path, lose):
    expected, _, _ = go(tmp_path, None)
    go(tmp_path, directory(tmp_path / "c"), stop_after=3, checkpoint_every=1)
    forgetful = Forgetful(directory(tmp_path / "c"), lose)
    values, records, _ = go(tmp_path, forgetful, checkpoint_every=10)
    assert not torch.equal(values, expected)
    assert [r.round for r in records if r.state_reset] == ([4] if lose is lose_a_replica else [])


def test_a_finished_run_resumes_to_its_result_without_training(tmp_path):
    expected, records, _ = go(tmp_path, directory(tmp_path / "c"))
    plan = Plan()
    values, resumed, fit = go(tmp_path, directory(tmp_path / "c"), wrap=plan.wrap)
    assert fit.resumed_from == 6
    assert plan.launches == 0
    assert torch.equal(values, expected)
    assert essence(resumed) == essence(records)


def test_early_stopping_remembers_its_best_round_through_a_checkpoint(tmp_path):
    options = {"validate_every": 1, "checkpoint_every": 1, "early_stopping": EarlyStopping(patience=2)}
    expected, records, fit = go(tmp_path, None, **options)
    go(tmp_path, directory(tmp_path / "c"), stop_after=2, **options)
    values, resumed, again = go(tmp_path, directory(tmp_path / "c"), **options)
    assert torch.equal(values, expected)
    assert essence(resumed) == essence(records)
    assert again.state.stopped == fit.state.stopped
    assert again.state.best.round == fit.state.best.round


@pytest.mark.fault(rows=[25], phases="RS")
def test_another_runs_checkpoint_is_refused_and_starting_over_is_asked_for(tmp_path):
    expected, records, _ = go(tmp_path, None)
    go(tmp_path, directory(tmp_path / "c", model="a"), stop_after=2, checkpoint_every=1)
    with pytest.raises(CheckpointError, match=r"belongs to another run.*model"):
        go(tmp_path, directory(tmp_path / "c", model="b"))
    values, again, fit = go(tmp_path, directory(tmp_path / "c", model="a"), resume=False, checkpoint_every=1)
    assert fit.resumed_from == 0
    assert essence(again) == essence(records)
    assert torch.equal(values, expected)


def test_a_resumed_run_survives_the_loss_of_a_replica(tmp_path):
    expected, _, _ = go(tmp_path, None)
    go(tmp_path, directory(tmp_path / "c"), stop_after=3, checkpoint_every=3)
    plan = Plan()
    launched = []

    def fail_first(launcher):
        watched = plan.wrap(launcher)
        launch = watched.launch

        def lose_one(ticket, description):
            running = launch(ticket, description)
            if not launched:
                launched.append(1)
                running.cancel()
            return running

        watched.launch = lose_one
        return watched

    values, _, _ = go(tmp_path, directory(tmp_path / "c"), checkpoint_every=3, wrap=fail_first)
    assert plan.launches >= 1
    assert torch.equal(values, expected)
