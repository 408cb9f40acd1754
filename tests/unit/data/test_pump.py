"""An iterator in a thread under a deadline."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from sparkdeep.data.prefetch import pumped
from sparkdeep.errors import DataError


def test_items_come_in_order_and_an_error_at_its_place():
    assert list(pumped(lambda _: iter(range(20)), 5.0, "silence")) == list(range(20))

    def failing(_):
        yield 1
        raise KeyError("here")

    items = pumped(failing, 5.0, "silence")
    assert next(items) == 1
    with pytest.raises(KeyError, match="here"):
        next(items)


def test_silence_is_named_after_the_deadline_and_signs_of_life_put_it_off():
    released = threading.Event()

    def silent(_):
        yield 1
        released.wait(20)

    items = pumped(silent, 0.4, "nothing came")
    assert next(items) == 1
    began = time.monotonic()
    with pytest.raises(DataError, match="nothing came"):
        next(items)
    assert 0.3 < time.monotonic() - began < 5
    released.set()

    def busy(beat):
        for _ in range(14):
            time.sleep(0.1)
            beat()
        yield 1

    assert list(pumped(busy, 1.0, "nothing came")) == [1]


def test_a_slow_reader_is_no_silence_and_little_is_made_ahead():
    made = []

    def producing(_):
        for number in range(6):
            made.append(number)
            yield number

    items = pumped(producing, 0.3, "silence")
    assert next(items) == 0
    time.sleep(0.8)
    assert len(made) <= 5
    assert list(items) == [1, 2, 3, 4, 5]


def test_closing_early_closes_what_is_read():
    closed = threading.Event()

    def endless(_):
        try:
            yield from itertools.count()
        finally:
            closed.set()

    items = pumped(endless, 5.0, "silence")
    assert next(items) == 0
    items.close()
    assert closed.wait(5)
