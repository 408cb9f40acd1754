"""What is on its way to a tracking server: in order, never waited for, kept when it is not taken, one warning."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from sparkdeep.tracking.outbox import Outbox


class Server:
    """Takes items; raises `trouble` while there is some."""

    def __init__(self, most=100):
        self.taken, self.tries, self.trouble, self.most = [], 0, None, most
        self.let = threading.Event()
        self.let.set()

    def __call__(self, items):
        self.tries += 1
        assert self.let.wait(10)
        if self.trouble is not None and (self.trouble.args[:1] != ("bad",) or "bad" in items[: self.most]):
            raise self.trouble
        self.taken += items[: self.most]
        return len(items[: self.most])


def outbox(server, **options):
    settings = {"timeout_s": 0.3, "progress_timeout_s": 5.0, "retry_s": 0.01, **options}
    return Outbox("Server", server, lambda error: isinstance(error, OSError), **settings)


def threads():
    return [t for t in threading.enumerate() if t.name == "sparkdeep-Server"]


@pytest.fixture(autouse=True)
def _nothing_left():
    yield
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


def test_items_arrive_in_order_and_the_thread_ends():
    server = Server(most=3)
    box = outbox(server)
    for item in range(20):
        box.put(item)
    assert box.close() == 0
    assert server.taken == list(range(20))
    assert not threads()


def test_putting_never_waits_for_a_server_that_hangs():
    server = Server()
    server.let.clear()
    box = outbox(server)
    began = time.monotonic()
    for item in range(100):
        box.put(item)
    assert time.monotonic() - began < 5.0  # the server hangs for longer
    assert len(box) == 100
    server.let.set()
    assert box.close() == 0
    assert server.taken == list(range(100))


def test_a_server_that_comes_back_gets_everything_after_one_warning(caplog):
    server = Server()
    server.trouble = ConnectionRefusedError("down")
    box = outbox(server, timeout_s=5.0)
    for item in range(5):
        box.put(item)
    while server.tries < 4:
        time.sleep(0.01)
    server.trouble = None
    assert box.close() == 0
    assert server.taken == list(range(5))
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "Server cannot be reached: down. Training goes on" in warning.getMessage()


def test_a_server_that_stays_down_is_given_up_in_time_and_the_items_are_kept_for_later(caplog):
    server = Server()
    server.trouble = ConnectionRefusedError("down")
    box = outbox(server)
    box.put("a")
    box.put("b")
    began = time.monotonic()
    assert box.close() == 2
    assert time.monotonic() - began < 8.0
    assert len(box) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "Server cannot be reached: down. Training goes on; what could not be sent is kept and tried again.",
        "Server: 2 item(s) of this run were not taken and are kept; call flush() when the server is back.",
    ]
    while threads():
        time.sleep(0.01)
    server.trouble = None
    assert box.close() == 0
    assert server.taken == ["a", "b"]


def test_a_server_that_works_slowly_is_waited_for_longer_than_one_that_fails():
    server = Server(most=1)
    box = outbox(lambda items: (time.sleep(0.1), server(items))[1], timeout_s=0.2)
    for item in range(8):
        box.put(item)
    assert box.close() == 0
    assert server.taken == list(range(8))


def test_a_server_that_hangs_is_waited_for_no_longer_than_was_said():
    server = Server()
    server.let.clear()
    box = outbox(server, progress_timeout_s=0.3)
    box.put("a")
    began = time.monotonic()
    assert box.close() == 1
    assert time.monotonic() - began < 8.0
    server.let.set()


def test_what_is_refused_is_named_and_holds_nothing_up(caplog):
    server = Server()
    server.trouble = ValueError("bad", "no such name")
    box = outbox(server)
    server.let.clear()
    for item in ("a", "bad", "c", "d"):
        box.put(item)
    server.let.set()
    assert box.close() == 0
    assert server.taken == ["a", "c", "d"]
    (warning,) = caplog.records
    assert "Server refused bad: " in warning.getMessage()
