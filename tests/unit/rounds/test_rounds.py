"""The loop under faults: what is lost is repeated to the same bits, what cannot be mended is said at once."""

from __future__ import annotations

import _thread
import contextlib
import socket
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.optim import SGD, AdamW
from twin import deal, flat, local_coordinator, make_fit, run, schema_of
from twin_faults import Plan, lost, marked_table, raises

from sparkdeep.data.shards import Shard
from sparkdeep.errors import NonFiniteError, ReplicaLostError, UserCodeError
from sparkdeep.models.program import Program
from sparkdeep.settings.run import EarlyStopping
from sparkdeep.storage.disks import StateFiles

SIZES = [22, 14]
X, Y = marked_table(SIZES)
# 22 rows in batches of 4 are 6 steps, 14 rows 4: rounds of 2 steps are 3 an epoch, 6 in all.
OPTIONS = {"epochs": 2, "batch_size": 4, "sync_every": 2, "retry_backoff_s": 0.001, "rounds_per_stage": 100}


def program(plan, **parts):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 1))
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.7)
    whole = {"loss": nn.MSELoss(), "optimizer": partial(AdamW, lr=0.01), "lr_scheduler": schedule, **parts}
    return Program(model=model, augment=plan.hook(), **whole)


def train(tmp_path, plan, validation=None, parts=None, **options):
    model, records, _ = run(
        tmp_path,
        program(plan, **(parts or {})),
        deal(X, Y, SIZES),
        schema_of(X, Y),
        validation=validation,
        wrap=plan.wrap,
        **{**OPTIONS, **options},
    )
    return flat(model), records


def validation_rows():
    x, y = marked_table([6, 6])
    return deal(x, y, [6, 6])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("undisturbed"), Plan())


@pytest.fixture(scope="module")
def undisturbed_scored(tmp_path_factory):
    plan = Plan()
    plan.meet_metric = lambda output, _label: float(output.mean())
    parts = {"metrics": {"m": Metric(plan.key)}}
    directory = tmp_path_factory.mktemp("scored")
    return train(directory, plan, validation=validation_rows(), parts=parts, validate_every=1)


def essence(records):
    return [(r.round, r.epoch, r.rows, r.loss) for r in records]


def assert_same_run(got, expected):
    assert torch.equal(got[0], expected[0])
    assert essence(got[1]) == essence(expected[1])


# -- repeated to the same bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 1, 2, 5, 8, 11])
@pytest.mark.parametrize("way", ["error", "line"])
def test_a_round_whose_replica_is_lost_is_repeated_to_the_same_bits(tmp_path, undisturbed, batch, way):
    plan = Plan()
    plan.when[0, batch] = lost("disk gone") if way == "error" else plan.hang_up(0)
    got = train(tmp_path, plan)
    assert_same_run(got, undisturbed)
    assert plan.launches == 2
    assert [r.round for r in got[1] if r.retries] == [batch // 2 + 1]
    assert not any(r.state_reset for r in got[1])


@pytest.mark.parametrize("rounds_per_stage", [1, "auto"])
@pytest.mark.parametrize("checkpoint_every", [1, 3])
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_durable_state_survives_the_loss_of_every_disk(
    tmp_path, undisturbed, batch, checkpoint_every, rounds_per_stage
):
    plan = Plan()
    plan.when[1, batch] = plan.wipe(0, 1)
    parameters, records = train(
        tmp_path,
        plan,
        replica_state="durable",
        checkpoint_every=checkpoint_every,
        rounds_per_stage=rounds_per_stage,
    )
    assert torch.equal(parameters, undisturbed[0])
    last_word = {r.round: r for r in records}  # rounds after the last snapshot are run and told again
    assert essence(last_word[n] for n in sorted(last_word)) == essence(undisturbed[1])
    assert not any(r.state_reset for r in records)


def test_a_lost_disk_without_durable_state_is_named_in_the_record_and_changes_the_run(tmp_path, undisturbed):
    plan = Plan()
    plan.when[1, 2] = plan.wipe(1)
    parameters, records = train(tmp_path, plan)
    assert [r.state_reset for r in records] == [[], [1], [], [], [], []]
    assert not torch.equal(parameters, undisturbed[0])


def test_state_lost_while_scoring_is_named_in_the_next_record(tmp_path):
    plan = Plan()
    wipe, scored = plan.wipe(1), []

    def metric(output, _label):
        scored.append(len(output))
        if len(scored) == 4:
            wipe(None)
        return 0.0

    plan.meet_metric = metric
    parts = {"metrics": {"m": Metric(plan.key)}}
    _, records = train(tmp_path, plan, validation=validation_rows(), parts=parts, validate_every=1)
    assert len(records) == 6
    assert [r.state_reset for r in records].count([1]) == 1
    assert all("m" in r.metrics for r in records)


class Metric(torchmetrics.MeanMetric):
    """Meets the plan's function wherever a replica scores a batch."""

    def __init__(self, key):
        super().__init__()
        self.key = key

    def update(self, output, label):
        from twin_faults import PLANS

        super().update(PLANS[self.key].meet_metric(output, label))


def test_a_replica_lost_while_scoring_costs_nothing_but_time(tmp_path, undisturbed_scored):
    plan = Plan()
    calls = []

    def metric(output, _label):
        calls.append(1)
        if len(calls) == 3:
            raise ReplicaLostError("gone")
        return float(output.mean())

    plan.meet_metric = metric
    parts = {"metrics": {"m": Metric(plan.key)}}
    got = train(tmp_path, plan, validation=validation_rows(), parts=parts, validate_every=1)
    assert plan.launches == 2
    assert_same_run(got, undisturbed_scored)
    assert [r.metrics for r in got[1]] == [r.metrics for r in undisturbed_scored[1]]


def test_scoring_draws_no_random_numbers_from_training(tmp_path, undisturbed_scored):
    plan = Plan()
    plan.meet_metric = lambda _output, _label: float(torch.rand(())) + float(np.random.rand())
    parts = {"metrics": {"m": Metric(plan.key)}}
    got = train(tmp_path, plan, validation=validation_rows(), parts=parts, validate_every=1)
    assert_same_run(got, undisturbed_scored)


@pytest.mark.parametrize("replica", [0, 1])
@pytest.mark.fault(rows=[22], phases="CK")
def test_a_full_disk_after_the_update_was_sent_repeats_the_round_to_the_same_bits(
    tmp_path, undisturbed, monkeypatch, replica
):
    plan, write, failed = Plan(), StateFiles.write, []

    def no_room_once(self, round_number, data):
        if round_number == 3 and self._directory.name == str(replica) and not failed:
            failed.append(1)
            raise OSError(28, "No space left on device")
        write(self, round_number, data)

    monkeypatch.setattr(StateFiles, "write", no_room_once)
    got = train(tmp_path, plan)
    assert failed
    assert plan.launches == 2
    assert_same_run(got, undisturbed)


def test_a_disk_that_cannot_be_read_repeats_the_round_to_the_same_bits(tmp_path, undisturbed, monkeypatch):
    plan, gather, calls = Plan(), Shard.gather, []

    def unreadable_once(self, split, indices, run=None):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(5, "Input/output error")
        return gather(self, split, indices, run)

    monkeypatch.setattr(Shard, "gather", unreadable_once)
    got = train(tmp_path, plan)
    assert plan.launches == 2
    assert_same_run(got, undisturbed)


def test_every_replica_lost_in_turn_is_still_the_same_run(tmp_path, undisturbed):
    plan = Plan()
    for batch in (1, 3, 7, 12):
        plan.when[0, batch] = plan.hang_up(0)
    plan.when[1, 4] = lost("gone")
    assert_same_run(train(tmp_path, plan, max_retries=10), undisturbed)
    assert plan.launches == 6


# -- said at once -----------------------------------------------------------------------------------------------------


@pytest.mark.fault(rows=[1, 2], phases="TR")
def test_the_users_own_exception_ends_the_fit_at_once_traceback_first(tmp_path):
    plan = Plan()
    plan.when[1, 2] = raises(KeyError("no such color"))
    with pytest.raises(UserCodeError) as caught:
        train(tmp_path, plan)
    text = str(caught.value)
    assert text.startswith("Traceback (most recent call last)")
    assert "no such color" in text
    assert "replica 1 on " in text
    assert "not retried" in text
    assert caught.value.replica == 1
    assert "faults.py" in caught.value.traceback_text
    assert plan.launches == 1


def open_a_file_that_is_not_there(_features):
    open("no such color.json")  # noqa: SIM115 (as a user's code would)


@pytest.mark.parametrize(
    "action",
    [open_a_file_that_is_not_there, raises(ConnectionRefusedError("no service")), raises(TimeoutError("too slow"))],
    ids=["file", "network", "timeout"],
)
@pytest.mark.fault(rows=[1], phases="TR")
def test_an_os_error_of_the_users_code_is_the_users_and_never_repeated(tmp_path, action):
    plan = Plan({(1, 2): action})
    with pytest.raises(UserCodeError, match=r"(?s)^Traceback.*not retried"):
        train(tmp_path, plan)
    assert plan.launches == 1


def test_an_os_error_of_the_users_metric_is_the_users(tmp_path):
    plan = Plan()
    plan.meet_metric = lambda output, _label: open_a_file_that_is_not_there(output)
    parts = {"metrics": {"m": Metric(plan.key)}}
    with pytest.raises(UserCodeError, match=r"no such color\.json"):
        train(tmp_path, plan, validation=validation_rows(), parts=parts, validate_every=1)
    assert plan.launches == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.fault(rows=[19], phases="AV")
def test_a_loss_that_is_not_finite_names_round_and_replica_and_never_reaches_the_mean(tmp_path, value):
    plan = Plan()
    plan.when[1, 2] = lambda features: features * value
    coordinator = local_coordinator()
    try:
        fit = make_fit(
            tmp_path,
            program(plan),
            deal(X, Y, SIZES),
            schema_of(X, Y),
            coordinator=coordinator,
            wrap=plan.wrap,
            **OPTIONS,
        )
        with pytest.raises(NonFiniteError, match=r"round 2: .*replica 1 .*Lower the learning rate") as caught:
            list(fit.rounds())
    finally:
        coordinator.close()
    assert (caught.value.round, caught.value.replica) == (2, 1)
    assert plan.launches == 1
    assert torch.isfinite(fit.state.parameters).all()
    assert fit.state.committed == 1


@pytest.mark.fault(rows=[5], phases="TR")
def test_when_retries_are_used_up_the_loss_of_the_replica_is_raised(tmp_path):
    plan = Plan({(0, batch): lost("no disk on this host") for batch in range(100)})
    with pytest.raises(ReplicaLostError, match=r"replica 0 .*no disk on this host") as caught:
        train(tmp_path, plan, max_retries=2)
    assert plan.launches == 3
    assert caught.value.replica == 0


def test_progress_gives_new_retries(tmp_path, undisturbed):
    plan = Plan()
    for batch in (0, 1, 4, 5):
        plan.when[0, batch] = lost("flaky")
    assert_same_run(train(tmp_path, plan, max_retries=2), undisturbed)
    with pytest.raises(ReplicaLostError):
        train(tmp_path, Plan({(0, batch): lost("flaky") for batch in (0, 1, 2)}), max_retries=2)


# -- ending early ------------------------------------------------------------------------------------------------------


def our_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("sparkdeep")]


def assert_nothing_is_left(address):
    deadline = time.monotonic() + 5.0
    while our_threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert our_threads() == []
    with pytest.raises(OSError):
        socket.create_connection((address.host, address.port), timeout=1.0).close()


@contextlib.contextmanager
def opened(tmp_path, plan, **options):
    coordinator = local_coordinator()
    try:
        yield make_fit(
            tmp_path,
            program(plan),
            deal(X, Y, SIZES),
            schema_of(X, Y),
            coordinator=coordinator,
            wrap=plan.wrap,
            **{**OPTIONS, **options},
        )
    finally:
        coordinator.close()


def test_a_generator_closed_early_leaves_no_thread_and_no_port(tmp_path):
    with opened(tmp_path, Plan()) as fit:
        rounds = fit.rounds()
        assert next(rounds).round == 1
        assert any("replica" in name for name in our_threads())
        rounds.close()
        address = fit.stages.coordinator.address
    assert_nothing_is_left(address)


def test_an_interrupt_between_rounds_leaves_nothing(tmp_path):
    with opened(tmp_path, Plan()) as fit:
        rounds = fit.rounds()
        next(rounds)
        with pytest.raises(KeyboardInterrupt):
            rounds.throw(KeyboardInterrupt)
        address = fit.stages.coordinator.address
    assert_nothing_is_left(address)


@pytest.mark.fault(rows=[14], phases="TR")
def test_an_interrupt_in_the_middle_of_a_round_leaves_nothing(tmp_path):
    def interrupt(_features):
        _thread.interrupt_main()
        time.sleep(0.3)

    with opened(tmp_path, Plan({(0, 3): interrupt})) as fit:
        with pytest.raises(KeyboardInterrupt):
            list(fit.rounds())
        address = fit.stages.coordinator.address
        assert fit.state.committed == 1
    assert_nothing_is_left(address)


def test_a_callback_can_stop_the_fit_after_the_round_it_was_given(tmp_path):
    with opened(tmp_path, Plan()) as fit:
        seen = []
        for record in fit.rounds():
            seen.append(record.round)
            if record.round == 2:
                fit.stop("good enough")
        assert seen == [1, 2]
        assert fit.state.stopped == "good enough"


def test_closing_the_stage_between_rounds_changes_not_a_bit(tmp_path, undisturbed):
    plan = Plan()
    with opened(tmp_path, plan) as fit:
        for _ in fit.rounds():
            fit.close_stage()
            assert not any("replica" in name for name in our_threads())
        fit.load_result()
        assert torch.equal(flat(fit.program.model), undisturbed[0])
    assert plan.launches == 6


# -- validation and stopping --------------------------------------------------------------------------------------------


def drift(model, _batch):
    """Every local step adds 1 to the weight."""
    return -model.weight.sum()


def miss(output, _label):
    return (output - 3).square().mean()


def counter(tmp_path, **options):
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    x = np.ones((8, 1), np.float32)
    rows = deal(x, x, [4, 4])
    program = Program(
        model=model, loss=None, training_step=drift, optimizer=partial(SGD, lr=1.0), metrics={"miss": miss}
    )
    options = {"epochs": 8, "batch_size": 4, "sync_every": 1, "validation": rows, **options}
    return run(tmp_path, program, rows, schema_of(x, x), **options)


def test_early_stopping_gives_back_the_best_rounds_parameters(tmp_path):
    rule = EarlyStopping(monitor="miss", patience=2)
    model, records, fit = counter(tmp_path, early_stopping=rule)
    assert [r.metrics["miss"] for r in records] == [4.0, 1.0, 0.0, 1.0, 4.0]
    assert model.weight.item() == 3.0
    assert "no better miss in 2 validations" in fit.state.stopped
    assert "best was round 3" in fit.state.stopped


def test_early_stopping_can_maximize_and_needs_a_least_change(tmp_path):
    model, records, _ = counter(tmp_path, early_stopping=EarlyStopping(monitor="miss", patience=1, mode="max"))
    assert (len(records), model.weight.item()) == (2, 1.0)
    rule = EarlyStopping(monitor="miss", patience=1, min_delta=2.0)
    model, records, _ = counter(tmp_path, early_stopping=rule)
    assert (len(records), model.weight.item()) == (3, 2.0)


def test_without_early_stopping_the_last_rounds_parameters_are_given(tmp_path):
    model, records, _ = counter(tmp_path)
    assert (len(records), model.weight.item()) == (8, 8.0)


@pytest.mark.parametrize(
    ("every", "validated"), [(1, [1, 2, 3, 4, 5, 6, 7, 8]), (3, [3, 6, 8]), ("epoch", [1, 2, 3, 4, 5, 6, 7, 8])]
)
def test_validation_comes_as_often_as_asked_and_always_last(tmp_path, every, validated):
    _, records, _ = counter(tmp_path, validate_every=every)
    assert [r.round for r in records if r.metrics] == validated
