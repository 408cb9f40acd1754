"""The ledger of slots: turns, several at once, deadlines, fits within fits."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest

from sparkdeep.errors import PreflightError
from sparkdeep.spark.session.slots import SlotLedger, ledger_of

JOIN_S = 10.0


class Background:
    """A fit in another thread: holds its slots until it is told to end."""

    def __init__(self, ledger, name, workers, slots, timeout_s=5.0):
        self.name = name
        self.ends = threading.Event()
        self.holds = threading.Event()
        self.lease = self.failure = None
        self.thread = threading.Thread(target=self.run, args=(ledger, workers, slots, timeout_s), daemon=True)
        self.thread.start()

    def run(self, ledger, workers, slots, timeout_s):
        try:
            with ledger.hold(self.name, workers, lambda: slots, timeout_s=timeout_s) as self.lease:
                self.holds.set()
                assert self.ends.wait(JOIN_S)
        except BaseException as error:
            self.failure = error

    def end(self):
        self.ends.set()
        self.thread.join(JOIN_S)
        assert not self.thread.is_alive()
        return self.failure


def waits(fit):
    """Whether a fit that was just started has to wait."""
    return not fit.holds.wait(0.3)


@pytest.mark.fault(rows=[16], phases="SL")
def test_fits_that_do_not_fit_in_beside_each_other_take_turns_in_the_order_of_asking():
    ledger = SlotLedger()
    first = Background(ledger, "first", 2, 2)
    assert first.holds.wait(JOIN_S)
    second = Background(ledger, "second", 2, 2)
    assert waits(second)
    small = Background(ledger, "small", 1, 2)
    assert waits(small)
    assert first.end() is None
    assert second.holds.wait(JOIN_S)
    assert waits(small)  # one slot would be free before second came, but second was there first
    assert second.end() is None
    assert small.holds.wait(JOIN_S)
    assert small.end() is None


def test_several_hold_slots_at_once_where_there_are_enough():
    ledger = SlotLedger()
    fits = [Background(ledger, str(i), 2, 4) for i in range(2)]
    assert all(fit.holds.wait(JOIN_S) for fit in fits)
    third = Background(ledger, "third", 1, 4)
    assert waits(third)
    assert fits[0].end() is None
    assert third.holds.wait(JOIN_S)
    assert fits[1].end() is None
    assert third.end() is None


def test_profiles_with_slots_of_other_sizes_share_one_cluster():
    # 8 CPUs: 8 slots of one CPU, or 4 of two. 4 of the first and 2 of the second are all of it.
    ledger = SlotLedger()
    single = Background(ledger, "single", 4, 8)
    double = Background(ledger, "double", 2, 4)
    assert single.holds.wait(JOIN_S)
    assert double.holds.wait(JOIN_S)
    more = Background(ledger, "more", 1, 8)
    assert waits(more)
    for fit in (single, double, more):
        assert fit.end() is None


def test_slots_come_back_from_a_fit_that_fails():
    ledger = SlotLedger()
    with pytest.raises(KeyError), ledger.hold("fails", 2, lambda: 2, timeout_s=1.0):
        raise KeyError
    with ledger.hold("next", 2, lambda: 2, timeout_s=0.1):
        pass


def test_a_silent_holder_is_named_after_the_deadline_and_the_queue_goes_on():
    ledger = SlotLedger()
    silent = Background(ledger, "fit abc", 2, 2)
    assert silent.holds.wait(JOIN_S)
    began = time.monotonic()
    with pytest.raises(PreflightError) as caught, ledger.hold("fit xyz", 2, lambda: 2, timeout_s=0.3):
        pass
    assert 0.3 <= time.monotonic() - began < 30
    for part in ("fit xyz", "2 of 2 slots", "fit abc (2 slots since", "no sign of life for 0.3 s", "parallelism=1"):
        assert part in str(caught.value)
    waiting = Background(ledger, "third", 2, 2)
    assert waits(waiting)
    assert silent.end() is None
    assert waiting.holds.wait(JOIN_S)
    assert waiting.end() is None


def test_a_holder_that_gives_signs_of_life_is_waited_for_beyond_the_deadline():
    ticks = [0.0]
    ledger = SlotLedger(clock=lambda: ticks[0])
    busy = Background(ledger, "busy", 2, 2)
    assert busy.holds.wait(JOIN_S)
    patient = Background(ledger, "patient", 2, 2, timeout_s=0.5)
    for _ in range(15):
        busy.lease.alive()
        ticks[0] += 0.4
        time.sleep(0.1)
        busy.lease.alive()
    assert patient.failure is None
    assert busy.end() is None
    assert patient.holds.wait(JOIN_S)
    assert patient.end() is None


def test_a_fit_within_a_callback_uses_the_slots_of_the_one_around_it_if_its_stage_is_closed():
    ledger = SlotLedger()
    with ExitStack() as stack:
        outer = stack.enter_context(ledger.hold("outer", 2, lambda: 2, timeout_s=1.0))
        outer.lent = False
        with (
            pytest.raises(PreflightError, match=r"inner.*callback.*outer \(2 slots.*needs_spark = True"),
            ledger.hold("inner", 1, lambda: 2, timeout_s=1.0),
        ):
            pass
        other = Background(ledger, "other", 1, 2)
        assert waits(other)
        outer.lent = True
        with ledger.hold("inner", 2, lambda: 2, timeout_s=0.1):
            assert waits(other)
        outer.lent = False
        assert waits(other)
    assert other.holds.wait(JOIN_S)
    assert other.end() is None


def test_a_fit_within_a_callback_may_use_slots_that_are_free():
    ledger = SlotLedger()
    with ledger.hold("outer", 2, lambda: 4, timeout_s=1.0) as outer:
        outer.lent = False
        with ledger.hold("inner", 2, lambda: 4, timeout_s=0.1):
            other = Background(ledger, "other", 1, 4)
            assert waits(other)
    assert other.holds.wait(JOIN_S)
    assert other.end() is None


def test_executors_that_come_up_are_seen_while_waiting():
    ledger = SlotLedger()
    slots = [2]
    first = Background(ledger, "first", 1, 2)
    assert first.holds.wait(JOIN_S)
    with pytest.raises(PreflightError), ledger.hold("too early", 2, lambda: slots[0], timeout_s=0.2):
        pass
    threading.Timer(0.5, slots.append, [4]).start()
    with ledger.hold("later", 2, lambda: slots[-1], timeout_s=5.0):  # half of four slots beside half of two
        assert first.failure is None
    assert first.end() is None


def test_each_application_has_a_ledger_of_its_own():
    assert ledger_of("a") is ledger_of("a")
    assert ledger_of("a") is not ledger_of("b")
