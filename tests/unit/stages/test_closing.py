"""When a round closes and whom it counts: quorum, replicas that are not finite, time budgets, deadlines, divergence."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from twin import deal, flat, local_coordinator, make_fit, run, schema_of
from twin_faults import Plan, marked_table

from sparkdeep.errors import (
    ConfigError,
    DivergedError,
    NonFiniteError,
    ReplicaDiedError,
    ReplicaDiedRepeatedlyError,
    ReplicaLostError,
    RoundTimeoutError,
)
from sparkdeep.models.program import Program
from sparkdeep.rounds.guards import FailureLedger, round_deadline_s
from sparkdeep.testing.injection import Injector
from sparkdeep.tracking.records import RoundRecord

SIZES = [16, 16, 16]


def program(lr=0.01, augment=None, optimizer=None, dropout=0.0):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1))
    return Program(model=net, loss=nn.MSELoss(), optimizer=optimizer or partial(SGD, lr=lr), augment=augment)


def fitted(tmp_path, own=None, sizes=SIZES, injector=None, **options):
    own = own or program()
    x, y = marked_table(sizes)
    settings = {"epochs": 3, "batch_size": 4, "sync_every": 2, **options}
    with injector.installed() if injector else contextlib.nullcontext():
        _, records, fit = run(tmp_path, own, deal(x, y, sizes), schema_of(x, y), **settings)
    if injector:
        injector.check_fired()
    return flat(own.model), records, fit


def again(tmp_path, records, **options):
    trained, repeated, _ = fitted(tmp_path, replay=records, **options)
    return trained, repeated


# -- quorum ---------------------------------------------------------------------------------------------------------


def adam():
    own = program(optimizer=partial(AdamW, lr=0.02), dropout=0.3)
    return dataclasses.replace(own, lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.8))


@pytest.mark.fault(rows=[11], phases="TR")
def test_a_round_closes_without_the_slowest_which_goes_back_and_takes_part_again(tmp_path):
    slow = Injector(tmp_path / "plan").delay_at("train", 3, 1, seconds=2.0)
    options = {"quorum": 2, "quorum_grace_s": 0.6, "epochs": 8}
    trained, records, _ = fitted(tmp_path, adam(), injector=slow, **options)
    late = [(r.round, part.replica) for r in records for part in r.replicas if part.dropped]
    assert (3, 1) in late
    assert not records[-1].replicas[1].dropped
    assert records[2].rows == 16
    assert records[2].replicas[1].rows == 0
    assert records[2].replicas[1].skipped_steps == 2
    assert [r.round for r in records] == list(range(1, 17))
    repeated, same = again(tmp_path, records, own=adam(), epochs=8)
    assert torch.equal(repeated, trained)
    assert [[p.dropped for p in r.replicas] for r in same] == [[p.dropped for p in r.replicas] for r in records]
    undisturbed, _, _ = fitted(tmp_path, adam(), epochs=8)
    assert not torch.equal(trained, undisturbed)


def test_one_that_is_late_again_and_again_finds_its_state_when_a_stage_is_opened_again(tmp_path):
    slow = Injector(tmp_path / "plan")
    for number in range(
        2, 9
    ):  # which of them it meets is a matter of threads: in a round that it was too late for, none
        slow.delay_at("train", number, 1, seconds=0.5)
    options = {"quorum": 2, "quorum_grace_s": 0.1, "epochs": 6}
    own = dataclasses.replace(adam(), augment=partial(_wait, 0.12))  # long enough for it to be asked again
    with slow.installed():
        trained, records, _ = fitted(tmp_path, own, rounds_per_stage=5, **options)
    late = [r.round for r in records if r.replicas[1].dropped]
    assert len(late) >= 2
    assert late[0] <= 5 < len(records), "it was late before a stage was opened again"
    assert not any(r.state_reset for r in records)
    repeated, _ = again(tmp_path, records, own=adam(), epochs=6)
    assert torch.equal(repeated, trained)


def test_with_a_grace_that_is_long_enough_nobody_is_late(tmp_path):
    slow = Injector(tmp_path / "plan").delay_at("train", 3, 1, seconds=0.3)
    trained, records, _ = fitted(tmp_path, injector=slow, quorum=2, quorum_grace_s=20.0)
    assert not any(part.dropped for r in records for part in r.replicas)
    assert torch.equal(trained, fitted(tmp_path)[0])


@pytest.mark.fault(rows=[11, 18], phases="RT")
def test_an_update_that_is_on_its_way_when_the_round_closes_is_read_and_forgotten(tmp_path):
    slow = Injector(tmp_path / "plan").delay_at("transfer", 2, 2, seconds=1.0)
    options = {"quorum": 2, "quorum_grace_s": 0.1, "epochs": 12}
    trained, records, _ = fitted(tmp_path, adam(), injector=slow, **options)
    assert records[1].replicas[2].dropped == "late"
    assert any(not record.replicas[2].dropped for record in records[2:])
    repeated, _ = again(tmp_path, records, own=adam(), epochs=12)
    assert torch.equal(repeated, trained)


@pytest.mark.parametrize("stages", [1, "auto"])
def test_scores_states_and_checkpoints_wait_for_one_that_goes_back(tmp_path, stages):
    slow = Injector(tmp_path / "plan").delay_at("train", 3, 0, seconds=0.8)
    options = {
        "replica_state": "durable",
        "checkpoint_every": 1,
        "rounds_per_stage": stages,
        "quorum": 2,
        "quorum_grace_s": 0.1,
    }
    trained, records, _ = fitted(tmp_path, adam(), injector=slow, **options)
    assert records[2].replicas[0].dropped == "late"
    repeated, _ = again(tmp_path, records, own=adam())
    assert torch.equal(repeated, trained)


@pytest.mark.fault(rows=[10], phases="TR")
def test_a_replica_that_stays_silent_is_lost_even_where_a_quorum_goes_on(tmp_path):
    hung = Injector(tmp_path / "plan").delay_at("train", 2, 1, seconds=8.0)
    began = time.monotonic()
    options = {
        "stall_timeout_s": 3.0,
        "quorum": 2,
        "quorum_grace_s": 0.05,
        "epochs": 60,
        "max_retries": 0,
        "rounds_per_stage": 1000,
    }
    with pytest.raises(ReplicaLostError, match=r"replica 1 .* was lost"):
        # Other rounds go on meanwhile, slowly enough for the silence to be noticed.
        fitted(tmp_path, program(augment=partial(_wait, 0.02)), injector=hung, **options)
    assert time.monotonic() - began < 10


def _wait(seconds, features):
    time.sleep(seconds)
    return features


# -- not finite -----------------------------------------------------------------------------------------------------


class Poison:
    """Multiplies the features of one replica's n-th batch by NaN."""

    def __init__(self, plan):
        self.hook = plan.hook()

    def __call__(self, features):
        return self.hook(features)


def poisoned(*places):
    plan = Plan({place: lambda features: features * math.nan for place in places})
    return Poison(plan)


@pytest.mark.identity(13)
@pytest.mark.fault(rows=[19], phases="AV")
def test_a_replica_that_is_not_finite_is_left_out_and_goes_on_from_before(tmp_path):
    own = adam()
    own = dataclasses.replace(own, augment=poisoned((1, 3)))
    trained, records, _ = fitted(tmp_path, own, on_nonfinite="drop")
    assert [[p.dropped for p in r.replicas] for r in records[:3]] == [["", "", ""], ["", "nonfinite", ""], ["", "", ""]]
    assert torch.isfinite(trained).all()
    assert records[1].rows == 16
    repeated, _ = again(tmp_path, records, own=adam())
    assert torch.equal(repeated, trained)


@pytest.mark.identity(13)
@pytest.mark.fault(rows=[19], phases="AV")
def test_when_nobody_is_left_the_fit_ends_and_the_mean_is_untouched(tmp_path):
    own = program(augment=poisoned((0, 2), (1, 2), (2, 2)))
    with pytest.raises(NonFiniteError, match=r"round 2: .* No other replica is left"):
        fitted(tmp_path, own, on_nonfinite="drop")


@pytest.mark.fault(rows=[19], phases="AV")
def test_a_round_is_taken_back_as_a_whole_and_its_rows_are_passed_over(tmp_path):
    own = adam()
    own = dataclasses.replace(own, augment=poisoned((1, 3)))
    trained, records, _ = fitted(tmp_path, own, on_nonfinite="rollback")
    assert [p.dropped for p in records[1].replicas] == ["rolled back", "nonfinite", "rolled back"]
    assert records[1].rows == 0
    repeated, _ = again(tmp_path, records, own=adam())
    assert torch.equal(repeated, trained)


@pytest.mark.identity(13)
def test_an_outer_optimizer_takes_no_step_in_a_round_that_is_taken_back(tmp_path):
    outer = partial(SGD, lr=0.7, momentum=0.9)
    own = program(augment=poisoned((0, 2)))
    seen = []
    x, y = marked_table(SIZES)
    coordinator = local_coordinator()
    fit = make_fit(
        tmp_path, own, deal(x, y, SIZES), schema_of(x, y), coordinator=coordinator, outer_optimizer=outer,
        epochs=2, batch_size=4, sync_every=2, on_nonfinite="rollback",
    )  # fmt: skip
    seen = [fit.state.parameters.detach().clone() for _ in fit.rounds()]
    coordinator.close()
    assert torch.equal(seen[1], seen[0])
    assert not torch.equal(seen[2], seen[1])


def test_rounds_that_are_taken_back_for_ever_end_the_fit(tmp_path):
    own = program(augment=poisoned(*[(1, batch) for batch in range(40)]))
    with pytest.raises(NonFiniteError, match="3 rounds in a row were taken back, and max_retries=2"):
        fitted(tmp_path, own, on_nonfinite="rollback", max_retries=2, epochs=10)


# -- seconds of local work ------------------------------------------------------------------------------------------


def test_rounds_of_seconds_take_what_each_gets_done_and_see_every_row_of_every_epoch_once(tmp_path):
    sizes = [40, 24, 8]
    own = adam()
    own = dataclasses.replace(own, augment=partial(_wait, 0.003))
    trained, records, _ = fitted(tmp_path, own, sizes=sizes, time_budget_s=0.02, epochs=2, batch_size=2)
    steps = np.array([[p.steps for p in r.replicas] for r in records])
    assert (steps.sum(0) == [40, 24, 8]).all()
    assert sum(r.rows for r in records) == 2 * sum(sizes)
    assert len(records) > 2
    assert {p.dropped for r in records for p in r.replicas} == {""}
    assert [r.epoch for r in records] == sorted(r.epoch for r in records)
    assert records[-1].epoch == 2
    repeated, same = again(tmp_path, records, own=adam(), sizes=sizes, time_budget_s=0.02, epochs=2, batch_size=2)
    assert torch.equal(repeated, trained)
    assert [[p.steps for p in r.replicas] for r in same] == steps.tolist()


def test_a_run_by_seconds_resumes_from_its_snapshot_to_rows_that_are_still_due(tmp_path):
    own = program(augment=partial(_wait, 0.003))
    lost = Injector(tmp_path / "plan").fail_at("train", 4, 1)
    options = {"replica_state": "durable", "checkpoint_every": 2, "time_budget_s": 0.01, "epochs": 2, "batch_size": 2}
    trained, _, fit = fitted(tmp_path, own, injector=lost, **options)
    assert sum(r.rows for r in fit.state.records) == 2 * sum(SIZES)
    repeated, _ = again(tmp_path, fit.state.records, time_budget_s=0.01, epochs=2, batch_size=2)
    assert torch.equal(repeated, trained)


def test_a_replica_out_of_rows_is_no_part_of_a_quorum_and_the_last_one_gets_to_its_end(tmp_path):
    sizes = [8, 8, 40]
    own = dataclasses.replace(adam(), augment=partial(_wait, 0.004))
    options = {"time_budget_s": 0.05, "quorum": 2, "quorum_grace_s": 0.0, "epochs": 1, "batch_size": 2}
    _, records, _ = fitted(tmp_path, own, sizes=sizes, **options)
    assert sum(p.steps for r in records for p in r.replicas if p.replica == 2) == 20


def test_rows_passed_over_by_seconds_are_passed_over_again_in_a_replay(tmp_path):
    own = dataclasses.replace(adam(), augment=poisoned((1, 3)))
    options = {"time_budget_s": 0.01, "epochs": 3}
    trained, records, _ = fitted(tmp_path, own, on_nonfinite="drop", **options)
    (dropped,) = [p for r in records for p in r.replicas if p.dropped]
    assert (dropped.dropped, dropped.replica) == ("nonfinite", 1)
    assert dropped.skipped_steps > 0
    repeated, same = again(tmp_path, records, own=adam(), **options)
    assert torch.equal(repeated, trained)
    assert [[p.skipped_steps for p in r.replicas] for r in same] == [
        [p.skipped_steps for p in r.replicas] for r in records
    ]


# -- deadlines and the ledger -----------------------------------------------------------------------------------------


def test_a_deadline_is_ten_medians_and_at_least_the_floor():
    records = [
        RoundRecord(round=i, epoch=1, rows=1, loss=0.0, compute_seconds=s, exchange_seconds=1.0)
        for i, s in enumerate([1, 2, 99])
    ]
    assert round_deadline_s([], 5.0) is None
    assert round_deadline_s(records, 5.0) == 30.0
    assert round_deadline_s(records, 50.0) == 50.0


@pytest.mark.fault(rows=[11], phases="TR")
def test_a_replica_that_works_on_and_on_meets_the_rounds_deadline_and_the_round_is_repeated(tmp_path):
    undisturbed, _, _ = fitted(tmp_path)
    slow = Injector(tmp_path / "plan").delay_at("train", 4, 2, seconds=8.0)
    began = time.monotonic()
    trained, records, _ = fitted(tmp_path, injector=slow, min_round_timeout_s=2.0)
    assert time.monotonic() - began < 8
    assert torch.equal(trained, undisturbed)
    (failure,) = records[3].failures
    assert (failure.error, failure.replica) == ("RoundTimeoutError", 2)
    assert "deadline of" in failure.message
    assert records[3].retries == 1


def test_a_deadline_that_is_missed_again_and_again_names_who_misses_it(tmp_path):
    slow = Injector(tmp_path / "plan")
    for _ in range(2):
        slow.delay_at("train", 4, 0, seconds=6.0)
    with pytest.raises(RoundTimeoutError, match=r"replica 0 .* quorum=") as caught:
        fitted(tmp_path, injector=slow, min_round_timeout_s=1.0, max_retries=1)
    assert any("Failures by host" in note for note in caught.value.__notes__)


@pytest.mark.fault(rows=[5], phases="TR")
def test_a_replica_that_dies_twice_running_ends_the_fit_before_its_retries_are_used_up():
    ledger = FailureLedger(max_retries=5)
    ledger.add(ReplicaDiedError("a", replica=1, host="h"), 3)
    with pytest.raises(
        ReplicaDiedRepeatedlyError, match=r"replica 1 died twice running in round 3, on h and then on g.*memoryOverhead"
    ):
        ledger.add(ReplicaDiedError("b", replica=1, host="g"), 3)


def test_deaths_of_different_replicas_or_with_progress_between_do_not_add_up():
    ledger = FailureLedger(max_retries=5)
    ledger.add(ReplicaDiedError("a", replica=1, host="h"), 3)
    ledger.add(ReplicaDiedError("b", replica=0, host="h"), 3)
    ledger.add(ReplicaLostError("c", replica=0, host="h"), 3)
    ledger.add(ReplicaDiedError("d", replica=0, host="g"), 3)
    ledger.progressed()
    ledger.add(ReplicaDiedError("e", replica=0, host="g"), 4)
    assert ledger.by_host == {"h": 3, "g": 2}
    assert len(ledger.take()) == 5
    assert ledger.take() == []


# -- divergence -----------------------------------------------------------------------------------------------------


def test_a_run_that_diverges_stops_before_the_round_that_shows_it(tmp_path):
    options = {"divergence_factor": 5.0, "epochs": 60, "replica_state": "durable", "checkpoint_every": 1}
    with pytest.raises(
        DivergedError, match=r"more than divergence_factor=5 times the lowest so far.*newest checkpoint is of round"
    ) as caught:
        fitted(tmp_path, program(lr=3.5), **options)
    assert caught.value.checkpoint == caught.value.round - 1
    fitted(tmp_path, program(lr=0.001), divergence_factor=5.0)


# -- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"quorum": 4}, "quorum=4: there are num_workers=3"),
        ({"min_workers": 0}, "min_workers=0"),
        ({"quorum": 2, "overlap": 1}, "overlap=1 with quorum=2"),
        ({"quorum": 2, "down_codec": "bf16"}, "down_codec='bf16' with quorum=2"),
        ({"quorum": 2, "aggregation": "ring"}, "aggregation='ring' with quorum=2"),
        ({"time_budget_s": 1.0, "inner_state": "average"}, "inner_state='average' with FedNova"),
        ({"time_budget_s": 0}, "time_budget_s=0"),
        ({"divergence_factor": 1.0}, "divergence_factor=1.0: must be above 1"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path, options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        fitted(tmp_path, **options)


def test_nothing_is_left_running_after_all_that():
    deadline = time.monotonic() + 10
    while any(t.name.startswith("sparkdeep") for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [t.name for t in threading.enumerate() if t.name.startswith("sparkdeep")] == []
