"""Recorded arrivals taken again, and how stale a push may be."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from asynchronous_runs import (
    EPOCHS,
    Slow,
    dropping,
    train,
)

from sparkdeep.errors import ConfigError
from sparkdeep.optim.asynchronous import FETCHED, Asynchronous
from sparkdeep.optim.local_work import DyLU, WarmStart
from sparkdeep.optim.outer import DelayedNesterov, Downpour

# -- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"time_budget_s": 0.01, "schedule": WarmStart(4)}, {"schedule": DyLU(), "sync_every": 3},
], ids=["epochs", "seconds", "dylu"])  # fmt: skip
def test_a_recorded_run_gives_its_bits_again(tmp_path, options):
    rule, outer = Asynchronous(1, 2), partial(DelayedNesterov, lr=0.3, delay=2)
    with Slow(1, 0.01):
        got, records, _ = train(tmp_path, rule, outer, own=dropping(), **options)
    with Slow(0, 0.005):
        again, repeated, _ = train(tmp_path, rule, outer, own=dropping(), replay=records, **options)
    assert torch.equal(got, again)
    assert [r.arrivals for r in repeated] == [r.arrivals for r in records]
    assert [[p.steps for p in r.replicas] for r in repeated] == [[p.steps for p in r.replicas] for r in records]
    assert [r.loss for r in repeated] == [r.loss for r in records]
    if not options:
        orders = [sorted(records[0].arrivals), sorted(records[0].arrivals, reverse=True)]
        others = [[dataclasses.replace(records[0], arrivals=order), *records[1:]] for order in orders]
        trained = [train(tmp_path, rule, outer, own=dropping(), replay=other)[0] for other in others]
        assert not all(torch.equal(one, got) for one in trained)


def test_a_warm_start_has_the_first_replica_alone(tmp_path):
    _, records, _ = train(
        tmp_path, Asynchronous(), partial(Downpour, lr=0.02), [24, 24], schedule=WarmStart(4), sync_every="epoch"
    )
    assert [r.replicas[1].dropped for r in records] == ["idle", "", ""]
    assert {replica for replica, _ in records[0].arrivals} == {0}
    assert {replica for replica, _ in records[1].arrivals} == {0, 1}
    assert [[p.steps for p in r.replicas] for r in records] == [[4, 0], [2, 2], [6, 6]]


def test_a_warm_start_by_the_clock_leaves_the_others_all_their_rows(tmp_path):
    sizes, warm = [24, 16], WarmStart(7)
    _, records, _ = train(
        tmp_path, Asynchronous(), partial(Downpour, lr=0.02), sizes, schedule=warm, time_budget_s=0.001
    )
    alone = [r for r in records if r.replicas[1].dropped == "idle"]
    assert sum(r.replicas[0].steps for r in alone) == 7
    assert alone == records[: len(alone)]
    assert not any(r.replicas[1].steps or r.replicas[1].skipped_steps for r in alone)
    assert [sum(r.replicas[i].steps for r in records) for i in range(2)] == [12, 8]
    # A warm start that is longer than the first replica's rows ends with them.
    _, records, _ = train(
        tmp_path, Asynchronous(), partial(Downpour, lr=0.02), sizes, schedule=WarmStart(100), time_budget_s=0.001
    )
    assert [sum(r.replicas[i].steps for r in records) for i in range(2)] == [12, 8]


@pytest.mark.parametrize("rule", [Asynchronous(1, 3), Asynchronous(1, 2)], ids=str)
def test_a_record_of_other_pushes_is_refused(tmp_path, rule):
    outer = partial(Downpour, lr=0.02)
    _, records, _ = train(tmp_path, Asynchronous(2, 2) if rule.n_push == 3 else Asynchronous(1, 1), outer)
    cut = [dataclasses.replace(record, arrivals=record.arrivals[:-1]) for record in records]
    with pytest.raises(ConfigError, match=r"n_fetch, n_push and batch_size that it had"):
        train(tmp_path, rule, outer, replay=records if rule.n_push == 3 else cut)


# -- staleness ---------------------------------------------------------------------------------------------------------


def _without(early, arrivals):
    """Arrivals without one of each replica's."""
    for replica, _ in early:
        arrivals.remove(next(one for one in arrivals if one[0] == replica))
    return arrivals


@pytest.mark.parametrize(("rule", "bound"), [((1, 1), 2), ((2, 2), 3), ((3, 2), 4), ((1, 2), 2)], ids=str)
def test_no_push_is_staler_than_it_may_be(tmp_path, rule, bound):
    sizes, outer = [32, 32, 16], partial(Downpour, lr=0.02)
    with Slow(2, 0.05):
        _, bounded, _ = train(tmp_path, Asynchronous(*rule, max_staleness=bound), outer, sizes)
    # In a script all of the others come between a fetch of the last replica and the push that follows it.
    early = [[2, 0]] if rule[1] > rule[0] else []
    late = [dataclasses.replace(r, arrivals=early + _without(early, sorted(r.arrivals))) for r in bounded]
    _, free, _ = train(tmp_path, Asynchronous(*rule), outer, sizes, replay=late)
    assert max(s for r in free for _, s in r.arrivals) > bound
    assert max(s for r in bounded for _, s in r.arrivals) <= bound
    pushes = [[sum(i == j and s != FETCHED for i, s in r.arrivals) for j in range(3)] for r in bounded]
    assert pushes == [[-(-8 // rule[1]), -(-8 // rule[1]), -(-4 // rule[1])]] * EPOCHS


def test_who_waits_for_a_slow_replica_is_not_taken_for_a_silent_one(tmp_path):
    rule = Asynchronous(3, 1, max_staleness=5)
    with Slow(1, 0.8):  # its third visit, in which it fetches, is what the other one's sixth waits for, to fetch
        _, records, _ = train(tmp_path, rule, partial(Downpour, lr=0.02), [32, 32], epochs=1, stall_timeout_s=2.3)
    assert len(records) == 1
    assert not records[0].retries


def test_a_record_whose_arrivals_were_not_kept_is_refused_with_where_to_get_them(tmp_path):
    rule, outer = Asynchronous(1, 1), partial(Downpour, lr=0.02)
    _, records, _ = train(tmp_path, rule, outer)
    cut = [dataclasses.replace(record, arrivals=[]) for record in records]
    with pytest.raises(ConfigError, match=r"round 1 is repeated from a record without arrivals.*written as they came"):
        train(tmp_path, rule, outer, replay=cut)
