"""Rounds divide an epoch: every step comes once, and no round crosses an epoch's end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkdeep.optim.schedule import Schedule
from sparkdeep.protocol.messages import Position, RoundSpec

SCHEDULES = st.builds(
    Schedule,
    steps_per_epoch=st.integers(1, 60),
    epochs=st.integers(1, 5),
    sync_every=st.integers(1, 80) | st.just("epoch"),
)


def walk(schedule):
    specs = []
    while (spec := schedule.next(len(specs))) is not None:
        specs.append(spec)
    return specs


@given(SCHEDULES)
def test_every_step_of_every_epoch_comes_once_and_in_order(schedule):
    steps = [(s.epoch, s.first_step + i) for s in walk(schedule) for i in range(s.num_steps)]
    assert steps == [(e, i) for e in range(schedule.epochs) for i in range(schedule.steps_per_epoch)]


@given(SCHEDULES)
def test_rounds_are_numbered_from_one_and_counted(schedule):
    specs = walk(schedule)
    assert [s.round for s in specs] == list(range(1, schedule.num_rounds + 1))
    assert all(1 <= s.num_steps <= schedule.stride for s in specs)


@given(SCHEDULES)
def test_no_round_crosses_the_end_of_an_epoch_and_one_ends_it(schedule):
    specs = walk(schedule)
    assert all(s.first_step + s.num_steps <= schedule.steps_per_epoch for s in specs)
    ends = [s.round for s in specs if schedule.epochs_done(s.round, ()) > schedule.epochs_done(s.round - 1, ())]
    assert ends == [schedule.rounds_per_epoch * e for e in range(1, schedule.epochs + 1)]


@given(SCHEDULES, st.integers(0, 400))
def test_a_position_is_a_function_of_the_committed_rounds(schedule, committed):
    spec, at = schedule.next(committed), schedule.position(committed)
    if spec is None:
        assert committed >= schedule.num_rounds
    else:
        assert at == Position(round=committed, epoch=spec.epoch, step=spec.first_step)


def test_the_last_round_of_an_epoch_may_be_short():
    schedule = Schedule(steps_per_epoch=7, epochs=2, sync_every=5)
    assert [(s.epoch, s.first_step, s.num_steps) for s in walk(schedule)] == [
        (0, 0, 5),
        (0, 5, 2),
        (1, 0, 5),
        (1, 5, 2),
    ]
    assert schedule.next(3) == RoundSpec(round=4, epoch=1, first_step=5, num_steps=2)


@pytest.mark.parametrize(("sync_every", "rounds"), [("epoch", 3), (7, 3), (100, 3), (6, 6), (1, 21)])
def test_an_epoch_or_more_a_round_is_one_round_an_epoch(sync_every, rounds):
    assert Schedule(steps_per_epoch=7, epochs=3, sync_every=sync_every).num_rounds == rounds
