"""A run that is stopped and resumed from its checkpoint is the undisturbed run."""

from __future__ import annotations

import dataclasses
import errno
import os
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from twin import deal, flat, local_coordinator, make_fit, schema_of
from twin_faults import Plan, marked_table

from sparkdeep.errors import CheckpointError, ConfigError, FencedError
from sparkdeep.models.program import Program
from sparkdeep.settings.run import EarlyStopping, RunSettings
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.local import LocalStore
from sparkdeep.tensors.state_dicts import pack, unpack

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

    def begin(self):
        return self._lost(self._inner.begin())

    def latest(self):
        return self._lost(self._inner.latest())

    def _lost(self, loaded):
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


# --- a checkpoint that cannot be written


class Failing:
    """A store whose writes fail from a given moment on, until it is mended."""

    def __init__(self, inner, error):
        self.inner, self.error, self.broken = inner, error, False
        self.uri, self.conditional = inner.uri, inner.conditional

    def __getattr__(self, name):
        real = getattr(self.inner, name)

        def call(*args, **kwargs):
            if self.broken and name in {"write", "create"}:
                raise self.error
            return real(*args, **kwargs)

        return call


ERRORS = [OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EIO, errno.EACCES)]


def breaking(tmp_path, error, **options):
    """A run of 6 rounds whose store is broken while rounds 3 and 4 are kept; returns what `go` does, and the store."""
    store = Failing(LocalStore(tmp_path / "c"), error)
    checkpoints = CheckpointDirectory(store, identity={})
    real = checkpoints.save

    def save(number, files, state):
        store.broken = number in {3, 4}
        real(number, files, state)

    checkpoints.save = save
    return go(tmp_path, checkpoints, checkpoint_every=1, **options), store


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: errno.errorcode[error.errno])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_the_one_before_is_whole(tmp_path, error):
    expected, records, _ = go(tmp_path, None)
    with pytest.raises(CheckpointError, match=rf"round 3 could not be written to .*{error.strerror}.*the run resumes"):
        breaking(tmp_path, error)
    values, resumed, fit = go(tmp_path, directory(tmp_path / "c"), checkpoint_every=1)
    assert fit.resumed_from == 2
    assert torch.equal(values, expected)
    assert essence(resumed) == essence(records)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: errno.errorcode[error.errno])
def test_or_it_is_only_warned_of_and_the_rounds_record_says_so(tmp_path, error, caplog):
    expected, records, _ = go(tmp_path, None)
    (values, got, _), store = breaking(tmp_path, error, on_checkpoint_error="warn")
    assert torch.equal(values, expected)
    assert essence(got) == essence(records)
    assert [r.round for r in got if r.checkpoint_error] == [3, 4]
    assert all(f"round {r.round} could not be written" in r.checkpoint_error for r in got[2:4])
    assert [r.checkpoint_bytes > 0 for r in got] == [True, True, False, False, True, True]
    assert sum("could not be written" in line for line in caplog.messages) == 2
    assert directory(tmp_path / "c").rounds() == [2, 5, 6]
    assert len({name.split("/")[1] for name in store.list("rounds")}) == 3  # nothing of what failed is left


def test_while_checkpoints_fail_the_last_one_that_was_written_can_be_resumed_from(tmp_path):
    expected, _, _ = go(tmp_path, None)
    breaking(tmp_path, ERRORS[0], on_checkpoint_error="warn", stop_after=4)
    values, records, fit = go(tmp_path, directory(tmp_path / "c"), checkpoint_every=1)
    assert fit.resumed_from == 2
    assert torch.equal(values, expected)
    assert not any(r.checkpoint_error for r in records)


def test_a_driver_that_was_superseded_ends_though_failures_are_only_warned_of(tmp_path):
    checkpoints = directory(tmp_path / "c")
    real = checkpoints.save

    def save(number, files, state):
        if number == 3:
            directory(tmp_path / "c").begin()
        real(number, files, state)

    checkpoints.save = save
    with pytest.raises(FencedError, match="is now written by process"):
        go(tmp_path, checkpoints, checkpoint_every=1, on_checkpoint_error="warn")
    assert directory(tmp_path / "c").rounds() == [1, 2]


def test_of_two_fits_on_one_folder_the_later_ends_with_the_undisturbed_result(tmp_path):
    expected, records, _ = go(tmp_path, None)
    first = directory(tmp_path / "c")
    real, second = first.save, []

    def save(number, files, state):
        if number == 3:
            second.append(go(tmp_path, directory(tmp_path / "c"), checkpoint_every=1))
        real(number, files, state)

    first.save = save
    with pytest.raises(FencedError):
        go(tmp_path, first, checkpoint_every=1)
    ((values, resumed, fit),) = second
    assert fit.resumed_from == 2
    assert torch.equal(values, expected)
    assert essence(resumed) == essence(records)


def test_warnings_in_place_of_durable_states_are_refused():
    with pytest.raises(
        ConfigError, match=r"on_checkpoint_error='warn' with replica_state='durable'.*Use replica_state"
    ):
        RunSettings(replica_state="durable", on_checkpoint_error="warn")
    with pytest.raises(ConfigError, match="on_checkpoint_error='ignore'"):
        RunSettings(on_checkpoint_error="ignore")


def test_error_feedback_and_random_streams_are_part_of_what_resumes(tmp_path):
    options = {"checkpoint_every": 1, "codec": "int8", "error_feedback": True, "replica_state": "durable"}
    expected, records, _ = go(tmp_path, None, **options)
    go(tmp_path, directory(tmp_path / "c"), stop_after=3, **options)
    values, resumed, fit = go(tmp_path, directory(tmp_path / "c"), **options)
    assert fit.resumed_from == 3
    assert torch.equal(values, expected)
    assert essence(resumed) == essence(records)
    without = {**options, "error_feedback": False}  # the control: it does matter here
    assert not torch.equal(go(tmp_path, None, **without)[0], expected)
