"""Replicas that come and go: fewer when executors do not come back, all of them again when they do."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW
from twin import deal, facts_of, local_coordinator, schema_of, write_shards

from sparkdeep.errors import ReplicaLostError
from sparkdeep.models.program import Program
from sparkdeep.rounds.fit import Fit, new_run_id, plan_of
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.stages.opener import SocketStages
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.local import LocalStore
from sparkdeep.testing.in_process import InProcessLauncher

ROWS = 48


class Elastic:
    """An in-process launcher whose slots a test sets, and which deals a table anew."""

    def __init__(self, tmp_path: Path, plan, schema, table, slots):
        self._tmp_path, self._schema, self._table = tmp_path, schema, table
        self.available = slots
        self.dealt = []
        self._inner = InProcessLauncher(plan, self._deal(slots), tmp_path / f"state-{new_run_id()}", self._deal)

    def _deal(self, count):
        self.dealt.append(count)
        sizes = [len(part) for part in np.array_split(np.arange(ROWS), count)]
        self.folders = write_shards(self._tmp_path / new_run_id(), deal(*self._table, sizes), self._schema)
        return self.folders

    num_replicas = property(lambda self: self._inner.num_replicas)

    def launch(self, ticket, description):
        return self._inner.launch(ticket, description)

    def renew(self):
        self._inner.renew()

    def resize(self, count):
        return self._inner.resize(count)

    def slots(self):
        return self.available


def fit_of(tmp_path, coordinator, *, slots=3, optimizer=None, checkpoints=None, workers=3, replay=(), **options):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 4)).astype(np.float32)
    table = x, (x @ np.array([1.0, -2.0, 0.5, 0.0], dtype=np.float32))[:, None]
    program = Program(model=nn.Linear(4, 1), loss=nn.MSELoss(), optimizer=optimizer or partial(AdamW, lr=0.05))
    local = LocalSettings(batch_size=4)
    run = RunSettings(
        num_workers=workers,
        **{
            "epochs": 4,
            "sync_every": 1,
            "rounds_per_stage": 1,
            "retry_backoff_s": 0.01,
            "replacement_timeout_s": 0.1,
            **options,
        },
    )
    plan = plan_of(program, local, schema_of(*table))
    launcher = Elastic(tmp_path, plan, schema_of(*table), table, workers)
    launcher.available = slots
    fit = Fit(
        program=program, local=local, settings=run, plan=plan, shards=facts_of(launcher.folders),
        stages=SocketStages(launcher=launcher, coordinator=coordinator), run=new_run_id(), checkpoints=checkpoints, replay=replay,
    )  # fmt: skip
    return fit, launcher


@pytest.fixture
def coordinator():
    made = local_coordinator()
    yield made
    made.close()


@pytest.mark.fault(rows=[7], phases="SL")
def test_a_run_shrinks_and_grows_and_every_epoch_is_still_one_pass(tmp_path, coordinator):
    fit, launcher = fit_of(tmp_path, coordinator, min_workers=1)
    records = []
    for record in fit.rounds():
        records.append(record)
        launcher.available = {5: 2, 9: 1, 13: 3}.get(record.round, launcher.available)
    changes = {r.round: r.num_workers_changed for r in records if r.num_workers_changed}
    assert changes == {6: "3 -> 2", 10: "2 -> 1", 14: "1 -> 3"}
    assert launcher.dealt == [3, 2, 1, 3]
    assert [len(r.replicas) for r in records[4:7]] == [3, 2, 2]
    assert records[5].state_reset == [0, 1]
    assert records[6].state_reset == []
    # So much of an epoch stays: rows of all rounds together are four passes, up to the rounding of a batch a change.
    assert abs(sum(r.rows for r in records) - 4 * ROWS) <= 3 * 4 * 3
    assert records[-1].loss < 0.5 * records[0].loss
    assert records[-1].epoch == 4


def test_the_recorded_changes_replayed_give_the_same_bits(tmp_path, coordinator):
    def trained(replay=()):
        fit, launcher = fit_of(tmp_path, coordinator, min_workers=1, replay=replay)
        for record in fit.rounds():
            launcher.available = {5: 2, 9: 3}.get(record.round, launcher.available)
        return fit.state.parameters.clone(), fit.state.records

    first, records = trained()
    second, _ = trained(records)
    assert torch.equal(first, second)


@pytest.mark.fault(rows=[8], phases="SL")
def test_a_replacement_is_waited_for_before_the_run_goes_on_with_fewer(tmp_path, coordinator):
    fit, launcher = fit_of(tmp_path, coordinator, min_workers=2, replacement_timeout_s=30.0)
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            launcher.available = 3

    for record in fit.rounds():
        if record.round == 2:
            launcher.available = 2
            fit._run.replicas.staffing.sleep = sleep
    assert len(waits) == 3
    assert launcher.dealt == [3]


@pytest.mark.fault(rows=[7], phases="SL")
@pytest.mark.parametrize("least", [None, 2])
def test_too_few_slots_are_counted_in_the_error_within_the_deadline(tmp_path, coordinator, least):
    fit, launcher = fit_of(tmp_path, coordinator, min_workers=least, open_timeout_s=60.0, max_retries=0)
    rounds = fit.rounds()
    for _ in range(3):
        next(rounds)
    launcher.available = 1
    fit._run.replicas.staffing.clock = itertools.count(0.0, 30.0).__next__
    fit._run.replicas.staffing.sleep = lambda _seconds: None
    with pytest.raises(ReplicaLostError, match=r"1 of the 3 slots .* open_timeout_s=60 s.*min_workers="):
        next(rounds)
    assert fit.state.committed == 3


def test_a_run_that_shrank_resumes_from_its_checkpoint_with_all_workers(tmp_path, coordinator):
    directory = CheckpointDirectory(LocalStore(tmp_path / "kept"), identity={})
    options = {"min_workers": 1, "checkpoint_every": 1, "checkpoints": directory}
    fit, launcher = fit_of(tmp_path, coordinator, **options)
    rounds = fit.rounds()
    for record in itertools.islice(rounds, 6):
        launcher.available = 2 if record.round >= 3 else 3
    rounds.close()
    assert fit.state.generation.num_replicas == 2
    again, launcher = fit_of(
        tmp_path,
        coordinator,
        **{**options, "checkpoints": CheckpointDirectory(LocalStore(tmp_path / "kept"), identity={})},
    )
    assert again.resumed_from == 6
    records = list(again.rounds())
    assert records[0].num_workers_changed == "2 -> 3"
    assert records[0].round == 7
    assert again.state.schedule.num_rounds == again.state.committed
    assert again.snapshots.latest().round == again.state.committed


def test_by_seconds_a_run_shrinks_as_well(tmp_path, coordinator):
    fit, launcher = fit_of(tmp_path, coordinator, min_workers=2, time_budget_s=0.0001)
    for record in fit.rounds():
        launcher.available = 2 if record.round >= 3 else 3
    assert len(fit.state.records[-1].replicas) == 2
    assert abs(sum(r.rows for r in fit.state.records) - 4 * ROWS) <= 4 * 3


def test_a_dealing_that_failed_is_made_again(tmp_path, coordinator):
    fit, launcher = fit_of(tmp_path, coordinator, min_workers=1)
    failures = ["another executor went away"]

    def resize(count):
        launcher._inner.num_replicas = count  # as ShardSource, which knows before its ingest is done
        if failures:
            raise ReplicaLostError(failures.pop())
        return type(launcher).resize(launcher, count)

    launcher.resize = resize
    for record in fit.rounds():
        launcher.available = 2 if record.round >= 3 else 3
    changes = {r.round: r.num_workers_changed for r in fit.state.records if r.num_workers_changed}
    assert changes == {4: "3 -> 2"}
    assert fit.state.records[3].retries == 1
