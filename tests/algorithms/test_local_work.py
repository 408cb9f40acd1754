"""Rules for the length of rounds: what they say in numbers, and that rounds of them train what they say they train."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, SequentialLR
from twin import deal, flat, local_coordinator, make_fit, run, schema_of

from sparkdeep.errors import ConfigError
from sparkdeep.models.program import Program
from sparkdeep.optim.local_work import QSR, AdaComm, Clock, DyLU, Epochs, PostLocal, WarmStart
from sparkdeep.optim.schedule import stretches
from sparkdeep.protocol.messages import RoundSpec
from sparkdeep.rounds.guards import round_deadline_s
from sparkdeep.rounds.inner_rates import InnerRates
from sparkdeep.settings.run import RunSettings
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.opening import open_store
from sparkdeep.tracking.records import ReplicaRecord, RoundRecord


def part(replica, steps, seconds=1.0):
    return ReplicaRecord(
        replica=replica, host="h", rows=steps, weight=steps, steps=steps, compute_seconds=seconds, input_seconds=0.0
    )


def record(number, loss, steps, seconds=(1.0, 1.0)):
    parts = [part(i, own, s) for i, (own, s) in enumerate(zip(steps, seconds, strict=True))]
    return RoundRecord(round=number, epoch=1, rows=sum(steps), loss=loss, replicas=parts)


def clock(step=0, rates=lambda step: 0.1, sync_every=8, records=(), steps_per_epoch=100):
    return Clock(
        step=step,
        steps_per_epoch=steps_per_epoch,
        sync_every=sync_every,
        rate=rates,
        highest=lambda step: max(rates(s) for s in range(step + 1)),
        records=records,
    )


# -- what they say ---------------------------------------------------------------------------------------------------


def test_epochs_are_whole_passes():
    assert Epochs(3).steps(clock()) == 300
    assert Epochs(3).crosses
    assert not Epochs(1).crosses


def test_post_local_is_dense_until_its_step_or_until_the_rate_falls():
    assert [PostLocal(4).steps(clock(step)) for step in (0, 3, 4, 90)] == [1, 1, 8, 8]

    def rates(step):  # warm-up, a plateau, a drop
        return 0.01 * min(step + 1, 10) if step < 30 else 0.01

    assert [PostLocal().steps(clock(step, rates)) for step in (0, 5, 12, 29, 30, 31)] == [1, 1, 1, 1, 8, 8]


def test_the_quadratic_rule_grows_as_the_rate_falls():
    rule = QSR(alpha=1.0)
    steps = [rule.steps(clock(rates=lambda _, rate=rate: rate)) for rate in (0.8, 0.25, 0.2, 0.1001, 1e-9, 0.0)]
    assert steps == [8, 16, 25, 99, 100, 100]


def test_the_quadratic_rule_waits_for_the_end_of_a_warm_up():
    def rates(step):  # up for ten steps, then down
        return 0.02 * step if step <= 10 else 0.2 * 0.9 ** (step - 10)

    rule = QSR(alpha=1.0)
    assert [rule.steps(clock(step, rates)) for step in (0, 1, 5, 9)] == [8] * 4
    assert rule.steps(clock(10, rates)) == 25
    assert rule.steps(clock(15, rates)) == 71  # (0.9^-5 / 0.2)^2


def test_adaptive_communication_follows_loss_and_rate():
    rule = AdaComm(every=2)
    records = [record(1, 4.0, (8, 8)), record(2, 4.0, (8, 8))]
    assert rule.steps(clock(16, records=records[:1])) == 8
    assert rule.steps(clock(16, records=records)) == 8
    records += [record(3, 1.5, (8, 8)), record(4, 0.5, (8, 8))]
    assert rule.steps(clock(32, records=records)) == 4  # sqrt(1 / 4) of 8
    assert rule.steps(clock(40, records=[*records, record(5, 0.1, (4, 4))])) == 4, "it stays for two rounds"
    halved = clock(32, lambda step: 0.1 if step < 32 else 0.025, records=records)
    assert rule.steps(halved) == 8  # ceil(8 sqrt(4 / 4))


def test_adaptive_communication_measures_rates_by_the_highest_and_leaves_out_what_is_not_finite():
    rule = AdaComm(every=2)
    records = [record(number, 4.0, (8, 8)) for number in (1, 2)] + [record(number, 1.0, (8, 8)) for number in (3, 4)]
    warmed = clock(32, lambda step: min(step, 10) / 100, records=records)  # from a rate of 0
    assert rule.steps(warmed) == 4  # ceil(8 sqrt(1 / 4)), not 1
    records[0] = dataclasses.replace(records[0], loss=math.nan)
    assert rule.steps(clock(32, records=records)) == 4
    records[1] = dataclasses.replace(records[1], loss=math.nan)
    assert rule.steps(clock(32, records=records)) == 8, "nothing to compare with"


def test_a_warm_start_has_one_replica_first_and_no_mixed_round():
    rule = WarmStart(20)
    assert [rule.steps(clock(step)) for step in (0, 8, 16, 20)] == [8, 8, 4, 8]
    assert [rule.idle(clock(step), 1) for step in (0, 19, 20)] == [True, True, False]
    assert not rule.idle(clock(0), 0)
    assert WarmStart(20, then=PostLocal(30)).steps(clock(25)) == 1


def test_speeds_become_steps():
    rule = DyLU(rounds=2)
    assert rule.shares(clock(), [9, 9]) == [8, 8]
    records = [
        record(1, 1.0, (8, 8), (9.0, 1.0)),
        record(2, 1.0, (8, 8), (1.0, 4.0)),
        record(3, 1.0, (8, 2), (1.0, 4.0)),
    ]
    assert rule.shares(clock(records=records), [9, 9]) == [8, 1]  # 16 steps in 2 s against 10 in 8 s: 8 and 1.25
    assert rule.shares(clock(records=records), [9] * 3) == [8, 8, 8], (
        "records of another number of replicas say nothing"
    )
    assert rule.shares(clock(records=records), [0, 9]) == [8, 8], "one that is through its rows is no measure"
    late = [record(number, 1.0, (8, 4, 0), (1.0, 1.0, 1.0)) for number in (1, 2)]
    assert rule.shares(clock(records=late), [9] * 3) == [8, 4, 2], (
        "one that never came in time gets half of the slowest's"
    )


def test_steps_over_the_end_of_an_epoch_come_as_stretches():
    spec = RoundSpec(round=1, epoch=1, first_step=3, num_steps=12, period=5)
    assert list(stretches(spec, 5)) == [(1, 3, 5), (2, 0, 5), (3, 0, 5)]
    assert list(stretches(spec, 4)) == [(1, 3, 4), (2, 0, 4), (3, 0, 4)], "one with fewer batches waits at each end"
    plain = RoundSpec(round=1, epoch=1, first_step=3, num_steps=2)
    assert list(stretches(plain, 4)) == [(1, 3, 4)]


def test_a_round_that_is_longer_than_those_before_is_given_longer():
    records = [dataclasses.replace(record(i, 1.0, (2, 2)), compute_seconds=3.0, exchange_seconds=1.0) for i in range(5)]
    assert round_deadline_s(records, 1.0) == 40.0
    assert round_deadline_s(records, 1.0, num_steps=200) == 4000.0
    assert round_deadline_s(records, 1.0, num_steps=1) == 40.0


# -- rates on the driver ---------------------------------------------------------------------------------------------


def warm_cosine(optimizer):
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    return SequentialLR(optimizer, [warm, CosineAnnealingLR(optimizer, T_max=20)], milestones=[5])


@pytest.mark.parametrize("scheduler", [None, warm_cosine, partial(MultiStepLR, milestones=[3, 7], gamma=0.1)])
def test_the_driver_knows_the_rates_of_a_plain_loop(scheduler):
    net = nn.Linear(2, 2)
    before = flat(net)
    program = Program(model=net, loss=nn.MSELoss(), optimizer=partial(AdamW, lr=0.3), lr_scheduler=scheduler)
    told = InnerRates(program)
    optimizer = AdamW(nn.Linear(2, 2).parameters(), lr=0.3)
    own = scheduler(optimizer) if scheduler else None
    expected = []
    for _ in range(15):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if own:
            own.step()
    assert [told.at(step) for step in (14, 3, *range(15))] == [expected[14], expected[3], *expected]
    assert told.highest(14) == max(expected)
    assert torch.equal(flat(net), before)


# -- whole fits ------------------------------------------------------------------------------------------------------

ROWS = [24, 24, 16]


def table(sizes=ROWS):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(sizes), 4))
    return x, x @ rng.normal(size=(4, 1)) + 0.1 * rng.normal(size=(sum(sizes), 1))


def program(scheduler=None, optimizer=None, augment=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    optimizer = optimizer or partial(SGD, lr=0.1, momentum=0.9)
    return Program(model=net, loss=nn.MSELoss(), optimizer=optimizer, lr_scheduler=scheduler, augment=augment)


def fitted(tmp_path, own=None, sizes=ROWS, **options):
    own = own or program()
    x, y = table(sizes)
    settings = {"epochs": 3, "batch_size": 4, "sync_every": 2, **options}
    _, records, fit = run(tmp_path, own, deal(x, y, sizes), schema_of(x, y), **settings)
    return flat(own.model), records, fit


def steps_of(records):
    return [max(part.steps for part in r.replicas) for r in records]


def test_a_rule_that_says_what_is_usual_changes_not_a_bit(tmp_path):
    usual, records, _ = fitted(tmp_path, sync_every=2)
    ruled, same, _ = fitted(tmp_path, schedule=PostLocal(0))
    assert torch.equal(ruled, usual)
    assert [r.loss for r in same] == [r.loss for r in records]
    dense, _, _ = fitted(tmp_path, sync_every=1)
    assert torch.equal(fitted(tmp_path, schedule=PostLocal(1000))[0], dense)
    assert not torch.equal(usual, dense)


def test_post_local_switches_where_the_rate_drops(tmp_path):
    drop = partial(MultiStepLR, milestones=[6], gamma=0.5)
    _, records, _ = fitted(tmp_path, program(scheduler=drop), sync_every=3, schedule=PostLocal())
    assert steps_of(records) == [1] * 6 + [3] * 4
    assert sum(r.rows for r in records) == 3 * sum(ROWS)


def test_rounds_of_two_epochs_see_every_row_twice(tmp_path):
    _, records, _ = fitted(tmp_path, epochs=5, schedule=Epochs(2))
    assert [r.rows for r in records] == [2 * sum(ROWS), 2 * sum(ROWS), sum(ROWS)]
    assert steps_of(records) == [12, 12, 6]
    once, again, _ = fitted(tmp_path, epochs=4, schedule=Epochs(1))
    assert torch.equal(once, fitted(tmp_path, epochs=4, sync_every="epoch")[0])
    assert len(again) == 4


def test_a_warm_start_is_the_first_replica_alone(tmp_path):
    x, y = table()
    port = local_coordinator()
    options = {"epochs": 2, "batch_size": 4, "sync_every": 2, "schedule": WarmStart(6)}
    fit = make_fit(tmp_path, program(), deal(x, y, ROWS), schema_of(x, y), coordinator=port, **options)
    rounds = fit.rounds()
    records = list(itertools.islice(rounds, 3))
    warm = fit.state.parameters.clone()
    rounds.close()
    port.close()
    assert [[p.steps for p in r.replicas] for r in records] == [[2, 0, 0]] * 3
    assert [[p.dropped for p in r.replicas] for r in records] == [["", "idle", "idle"]] * 3
    alone = program()
    run(tmp_path, alone, deal(x[:24], y[:24], [24]), schema_of(x, y), epochs=1, batch_size=4, sync_every=2)
    assert torch.equal(warm, flat(alone.model))
    _, then, _ = fitted(tmp_path, epochs=2, sync_every=2, schedule=WarmStart(6))
    assert [p.steps for p in then[3].replicas] == [2, 2, 2]
    assert sum(r.rows for r in then) == 24 + sum(ROWS)


def test_a_warm_start_that_is_the_whole_run_is_refused_and_one_of_most_of_it_is_warned_of(tmp_path, caplog):
    with pytest.raises(ConfigError, match=r"WarmStart\(num_steps=18.*a run of 18 local steps: only the first replica"):
        fitted(tmp_path, schedule=WarmStart(18))
    with pytest.raises(ConfigError, match=r"schedule that is the same for all replicas"):
        WarmStart(5, then=WarmStart(3))
    assert not caplog.records
    fitted(tmp_path, schedule=WarmStart(10))
    assert "trains alone for more than half of the run, which has 18 local steps" in caplog.text


def test_post_local_with_a_constant_rate_is_warned_of(tmp_path, caplog):
    fitted(tmp_path, epochs=1, schedule=PostLocal(3))
    fitted(tmp_path, program(scheduler=partial(MultiStepLR, milestones=[2])), epochs=1, schedule=PostLocal())
    assert not caplog.records
    _, records, _ = fitted(tmp_path, epochs=1, schedule=PostLocal())
    assert "PostLocal() with a constant learning rate" in caplog.text
    assert steps_of(records) == [1] * 6


def test_a_round_in_which_nobody_has_a_row_takes_no_outer_step(tmp_path):
    # The first replica is through its 16 rows after 4 steps, the others are idle until step 7: round 3 has nobody.
    momentum = partial(SGD, lr=0.7, momentum=0.9, nesterov=True)
    sizes, options = [16, 24], {"epochs": 2, "sync_every": 2, "outer_optimizer": momentum}
    x, y = table(sizes)
    own = program()
    fit = make_fit(
        tmp_path, own, deal(x, y, sizes), schema_of(x, y), coordinator=(port := local_coordinator()), batch_size=4,
        schedule=WarmStart(7), **options,
    )  # fmt: skip
    seen = [(record.rows, fit.state.parameters.clone()) for record in fit.rounds()]
    port.close()
    assert [rows for rows, _ in seen[:4]] == [8, 8, 0, 4]
    assert torch.equal(seen[2][1], seen[1][1])
    assert not torch.equal(seen[3][1], seen[2][1])


def test_slow_replicas_take_fewer_steps_and_every_row_counts(tmp_path):
    x, y = table([24, 24])
    x[:24, 0] = 99.0  # marks the slow replica's rows
    own = program(augment=_slow_where_marked)
    options = {"epochs": 4, "batch_size": 4, "sync_every": 4, "schedule": DyLU()}
    _, records, _ = run(tmp_path, own, deal(x, y, [24, 24]), schema_of(x, y), **options)
    paced = next(r for r in records[1:] if all(p.steps for p in r.replicas))
    assert paced.replicas[0].steps < paced.replicas[1].steps == 4
    assert sum(r.rows for r in records) == 4 * 48
    again = program()
    _, repeated, _ = run(tmp_path, again, deal(x, y, [24, 24]), schema_of(x, y), replay=records, **options)
    assert torch.equal(flat(again.model), flat(own.model))
    assert [[p.steps for p in r.replicas] for r in repeated] == [[p.steps for p in r.replicas] for r in records]


def _slow_where_marked(features):
    if float(features[0, 0]) == 99.0:
        time.sleep(0.15)
    return features


@pytest.mark.parametrize("schedule", [PostLocal(7), QSR(0.1), AdaComm(every=2), WarmStart(5), Epochs(2)], ids=repr)
def test_stages_snapshots_and_a_resume_change_not_a_bit(tmp_path, schedule):
    scheduler = partial(CosineAnnealingLR, T_max=40)
    options = {"epochs": 4, "sync_every": 2, "schedule": schedule}
    whole, records, _ = fitted(tmp_path, program(scheduler), **options)
    staged, _, _ = fitted(
        tmp_path, program(scheduler), rounds_per_stage=1, replica_state="durable", checkpoint_every=2, **options
    )
    assert torch.equal(staged, whole)
    x, y = table()
    for stop_after in (2, None):
        own = program(scheduler)
        coordinator = local_coordinator()
        try:
            fit = make_fit(
                tmp_path, own, deal(x, y, ROWS), schema_of(x, y), coordinator=coordinator, batch_size=4,
                checkpoint_every=1, checkpoints=CheckpointDirectory(open_store(str(tmp_path / "kept")), identity={}), **options,
            )  # fmt: skip
            rounds = fit.rounds()
            for one in rounds:
                if one.round == stop_after:
                    break
            rounds.close()
            fit.load_result()
        finally:
            coordinator.close()
    assert torch.equal(flat(own.model), whole)
    assert [r.loss for r in fit.state.records] == [r.loss for r in records]


def test_a_ring_takes_rounds_of_any_length_that_all_have(tmp_path):
    options = {"schedule": PostLocal(3), "sync_every": 2}
    star, _, _ = fitted(tmp_path, aggregation="star", **options)
    ring, records, _ = fitted(tmp_path, aggregation="ring", **options)
    assert {r.aggregation for r in records} == {"ring"}
    assert torch.equal(ring, star)


# -- what cannot be meant --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(QSR, 0.0), r"QSR\.alpha=0\.0: must be a positive number"),
        (partial(PostLocal, -1), r"PostLocal\.switch_step=-1: must be a whole number of at least 0"),
        (partial(AdaComm, every=0), r"AdaComm\.every=0"),
        (partial(Epochs, 1.5), r"Epochs\.count=1\.5"),
        (partial(WarmStart, 0), r"WarmStart\.num_steps=0"),
        (partial(WarmStart, 5, then=DyLU()), r"WarmStart\.then=DyLU.*the same for all replicas"),
        (partial(DyLU, rounds=0), r"DyLU\.rounds=0"),
        (
            partial(RunSettings, schedule="qsr"),
            r"schedule='qsr': must be Epochs\(count\), PostLocal\(switch_step\), .*, or None",
        ),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": QSR(1.0), "time_budget_s": 3.0},
            r"schedule=QSR.*time_budget_s=3.*contradicts a deadline in seconds",
        ),
        ({"schedule": DyLU(), "time_budget_s": 3.0}, r"schedule=DyLU.*time_budget_s=3"),
        ({"schedule": QSR(1.0), "overlap": 1}, r"schedule=QSR.*overlap=1: the next round begins before"),
        ({"schedule": WarmStart(3), "aggregation": "ring"}, r"aggregation='ring' with schedule="),
        ({"quorum": 9}, r"quorum=9: there are num_workers=3 replicas"),
    ],
)
def test_settings_that_contradict_a_rule_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        fitted(tmp_path, **options)


def test_an_optimizer_without_a_rate_is_refused_where_a_rule_needs_one(tmp_path):
    class Rateless(SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.1)
            for group in self.param_groups:
                group["lr"] = math.nan

    with pytest.raises(ConfigError, match=r"optimizer Rateless tells the learning rate nan"):
        fitted(tmp_path, program(optimizer=Rateless), schedule=QSR(1.0))


def test_rounds_that_are_left_are_estimated_from_the_next_one(tmp_path):
    _, _, fit = fitted(tmp_path, epochs=2, schedule=PostLocal(4))
    assert fit.rounds_left == 0
    x, y = table()
    coordinator = local_coordinator()
    try:
        options = {"batch_size": 4, "epochs": 2, "sync_every": 2}
        known = make_fit(tmp_path, program(), deal(x, y, ROWS), schema_of(x, y), coordinator=coordinator, **options)
        ruled = make_fit(
            tmp_path,
            program(),
            deal(x, y, ROWS),
            schema_of(x, y),
            coordinator=coordinator,
            schedule=PostLocal(4),
            **options,
        )
    finally:
        coordinator.close()
    assert (known.rounds_left, ruled.rounds_left) == (6, 12)
