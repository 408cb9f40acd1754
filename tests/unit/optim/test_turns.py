"""Whose turn it is in an asynchronous window: the account alone, without threads."""

from __future__ import annotations

import dataclasses
import random

import pytest

from sparkdeep.errors import ConfigError
from sparkdeep.optim.asynchronous import FETCHED, Asynchronous, Turns
from sparkdeep.protocol.messages import Visit


def visit(steps, *, pushes=True, fetches=True):
    return Visit(round=1, steps=steps, pushes=pushes, fetches=fetches, finite=True)


def next_of(turns, replica, rule, length):
    """A replica's next visit in a window of `length` steps, and whether it is its last."""
    steps = turns.steps[replica] + 1
    while steps < length and steps % rule.n_push and steps % rule.n_fetch:
        steps += 1
    last = steps == length
    pushes, fetches = last or steps % rule.n_push == 0, not last and steps % rule.n_fetch == 0
    return visit(steps, pushes=pushes, fetches=fetches), last


def come(turns, replica, what, *, last=False):
    assert turns.may_come(replica, what, last=last)
    before = turns.come(replica, what)
    if last:
        turns.leave(replica)
    return before


@pytest.mark.parametrize("seed", range(40))
def test_whoever_may_come_first_somebody_always_may_and_none_is_too_stale(seed):
    rng = random.Random(seed)
    count, n_fetch, n_push = rng.randint(1, 6), rng.randint(1, 6), rng.randint(1, 6)
    rule = Asynchronous(n_fetch, n_push)
    bound = rule.least_staleness(count) + rng.choice((0, 0, 1, 4))
    rule = dataclasses.replace(rule, max_staleness=bound)
    lengths = [rng.randint(1, 40) for _ in range(count)]
    turns = Turns(count, rule, round_number=1)
    fast = rng.randrange(count)
    while turns.working:
        able = [(i, *next_of(turns, i, rule, lengths[i])) for i in sorted(turns.working)]
        able = [(i, what, last) for i, what, last in able if turns.may_come(i, what, last=last)]
        assert able, "all wait for each other"
        i, what, last = next((one for one in able if one[0] == fast), rng.choice(able))
        come(turns, i, what, last=last)
    assert max(staleness for _, staleness in turns.log) <= bound
    assert sum(s != FETCHED for _, s in turns.log) == sum(-(-length // n_push) for length in lengths)


@pytest.mark.parametrize("bound", [1, 2, 3])
def test_a_push_waits_exactly_as_long_as_it_would_make_another_too_stale(bound):
    turns = Turns(2, Asynchronous(max_staleness=bound), round_number=1)
    for steps in range(1, bound + 1):
        come(turns, 0, visit(steps))
    assert not turns.may_come(0, visit(bound + 1), last=False)
    come(turns, 1, visit(1))
    assert turns.log[-1] == [1, bound]
    come(turns, 0, visit(bound + 1))


def test_a_replica_that_only_fetches_or_has_left_holds_up_nobody():
    turns = Turns(2, Asynchronous(2, 3, max_staleness=1), round_number=1)
    come(turns, 1, visit(3, fetches=False), last=True)
    for steps in (2, 3, 4, 6):
        come(turns, 0, visit(steps, pushes=steps % 3 == 0, fetches=steps % 2 == 0))
    assert turns.log == [[1, 0], [0, FETCHED], [0, 0], [0, FETCHED], [0, 0]]


def test_without_a_bound_nobody_waits_and_staleness_counts_the_pushes_of_others_since_the_fetch():
    turns = Turns(3, Asynchronous(), round_number=1)
    for steps in range(1, 5):
        come(turns, 0, visit(steps))
    come(turns, 1, visit(1))
    assert turns.log == [[0, 0]] * 4 + [[1, 4]]
    come(turns, 2, visit(2, fetches=False))
    come(turns, 2, visit(4))
    assert turns.log[5:] == [[2, 5], [2, 5]]  # its own pushes do not make it staler


def test_a_push_is_of_the_steps_since_the_one_before():
    turns = Turns(1, Asynchronous(1, 2), round_number=1)
    assert come(turns, 0, visit(1, pushes=False)) == 0
    assert come(turns, 0, visit(2)) == 0
    assert come(turns, 0, visit(3, pushes=False)) == 2
    assert come(turns, 0, visit(4, fetches=False), last=True) == 2
    assert not turns.working


def test_a_recorded_order_is_kept_whatever_the_bound():
    turns = Turns(2, Asynchronous(max_staleness=1), round_number=1, recorded=[1, 1, 0, 1, 0])
    steps = {0: 0, 1: 0}
    for replica in (1, 1, 0, 1, 0):
        for other in turns.working - {replica}:
            assert not turns.may_come(other, visit(steps[other] + 1), last=False)
        steps[replica] += 1
        come(turns, replica, visit(steps[replica]), last=steps[replica] == {0: 2, 1: 3}[replica])
    assert [replica for replica, _ in turns.log] == [1, 1, 0, 1, 0]


def test_a_record_in_which_a_replica_came_in_less_or_more_often_is_refused():
    turns = Turns(2, Asynchronous(), round_number=3, recorded=[0, 1, 1])
    come(turns, 0, visit(1))
    with pytest.raises(ConfigError, match=r"round 3 .* replica 0 came in 1 times, and now it does more often"):
        turns.may_come(0, visit(2), last=False)
    come(turns, 1, visit(1))
    with pytest.raises(ConfigError, match=r"replica 1 came in 2 times, and now it does less often.*n_fetch, n_push"):
        turns.leave(1)


def test_a_record_without_arrivals_is_refused_with_where_to_get_them():
    turns = Turns(1, Asynchronous(), round_number=1, recorded=[])
    with pytest.raises(ConfigError, match=r"from a record without arrivals.*written as they came"):
        turns.may_come(0, visit(1), last=False)
