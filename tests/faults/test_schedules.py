"""Random lists of faults on the in-process twin: whatever happens, in whatever order, the run is the undisturbed one.

SPARKDEEP_FAULT_EXAMPLES says how many lists are tried; `benchmarks/faults.py` tries many more than the gate.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from invariants import ROUNDS, assert_invariants, train
from twin_faults import Plan

from sparkdeep.protocol.refusals import Body
from sparkdeep.replica import stage as session
from sparkdeep.rounds import loop as rounds
from sparkdeep.rounds.run_state import RunState
from sparkdeep.testing.injection import Injector

EXAMPLES = int(os.environ.get("SPARKDEEP_FAULT_EXAMPLES", "60"))

_PLACES = {
    # In any round: a stage opens whenever it must, but it opens.
    "fail": ("slots", "load", "train", "step", "transfer", "average"),
    "delay": ("slots", "load", "train", "step", "transfer", "average", "between"),
    "corrupt": ("transfer",),
    "hang-up": ("load", "train", "step", "transfer"),
    "wipe": ("train", "step", "transfer"),
}
_ON_DRIVER = {"slots", "average", "between"}


@st.composite
def events(draw):
    kind = draw(st.sampled_from(sorted(_PLACES)))
    phase = draw(st.sampled_from(_PLACES[kind]))
    number = None if phase in {"slots", "load"} else draw(st.integers(1, ROUNDS))
    replica = None if phase in _ON_DRIVER else draw(st.integers(0, 1))
    return kind, phase, number, replica


def schedules():
    # Of two faults at one place the second waits for the place to be reached again, which need not happen.
    return st.lists(events(), max_size=4, unique_by=lambda event: event[1:])


def planned(folder, plan, schedule):
    injector = Injector(folder / "plan")
    for kind, phase, number, replica in schedule:
        if kind == "fail":
            injector.fail_at(phase, number, replica)
        elif kind == "delay":
            injector.delay_at(phase, number, replica, seconds=0.01)
        elif kind == "corrupt":
            injector.corrupt_at(phase, number, replica)
        elif kind == "hang-up":
            injector.call_at(phase, number, replica, action=lambda who=replica: plan.hang_up(who)(None))
        else:
            injector.call_at(phase, number, replica, action=lambda: plan.wipe(0, 1)(None))
    return injector


def check(undisturbed, schedule, every, rounds_per_stage, durable):
    wiped = any(event[0] == "wipe" for event in schedule)
    state = {"replica_state": "durable", "checkpoint_every": every} if durable or wiped else {}
    with tempfile.TemporaryDirectory() as name:
        plan = Plan()
        injector = planned(Path(name), plan, schedule)
        with injector.installed():
            got = train(Path(name), plan=plan, injector=injector, rounds_per_stage=rounds_per_stage, **state)
    assert_invariants(got, undisturbed)
    assert not any(record.state_reset for record in got.records)


def tried(undisturbed, examples, *, phases=(Phase.generate, Phase.shrink)):
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(
        schedule=schedules(),
        every=st.integers(1, 3),
        rounds_per_stage=st.sampled_from([1, 2, 100]),
        durable=st.booleans(),
    )
    def holds(schedule, every, rounds_per_stage, durable):
        check(undisturbed, schedule, every, rounds_per_stage, durable)

    holds()


@pytest.mark.fault(rows=[41], phases="LD,TR,RT")
@pytest.mark.timeout(3600)
def test_any_four_faults_in_any_order_cost_time_and_not_a_bit(undisturbed):
    began = time.monotonic()
    tried(undisturbed, EXAMPLES)
    print(f"{EXAMPLES} schedules in {time.monotonic() - began:.1f} s")


# -- what such a search must find -----------------------------------------------------------------------------------------


def skip_the_round(monkeypatch):
    recover = rounds._recover

    def skipping(run, error):
        recover(run, error)
        run.state.committed += run.state.committed < ROUNDS

    monkeypatch.setattr(rounds, "_recover", skipping)


def count_twice(monkeypatch):
    """After a failure, what a replica trained is counted a second time."""
    recover, starting = rounds._recover, RunState.starting
    again = []

    def remembering(run, error):
        recover(run, error)
        again.append(1)

    def doubled(self, **how):
        start = starting(self, **how)
        if again:
            again.clear()
            start.parameters.mul_(2.0)
        return start

    monkeypatch.setattr(rounds, "_recover", remembering)
    monkeypatch.setattr(RunState, "starting", doubled)


def believe_damage(monkeypatch):
    monkeypatch.setattr(Body, "verify", lambda self: self._read(memoryview(bytearray(8))))


def forget_the_state(monkeypatch):
    def reset(replica, answer, sent, states):
        replica.restart(answer.scheduler_steps)
        return "restored"

    monkeypatch.setattr(session, "_restore", reset)


@pytest.mark.parametrize("bug", [skip_the_round, count_twice, believe_damage, forget_the_state])
def test_a_bug_in_what_follows_a_fault_is_found(undisturbed, monkeypatch, bug):
    bug(monkeypatch)
    with pytest.raises((AssertionError, ExceptionGroup)):
        tried(undisturbed, 200, phases=(Phase.generate,))
