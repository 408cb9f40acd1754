"""Calls without the run's token: every kind of message, every way in, and every bit of the token wrong once."""

from __future__ import annotations

import json
import secrets
import socket
import struct
import time
from dataclasses import asdict

import pytest
from twin import local_coordinator

from sparkdeep.protocol.messages import Hello
from sparkdeep.protocol.wire import TOKEN_BYTES, ConnectionLostError
from sparkdeep.replica.link import ReplicaLink

KINDS = [
    "hello",
    "open",
    "opened",
    "train",
    "update",
    "part",
    "state",
    "evaluate",
    "scores",
    "error",
    "log",
    "beat",
    "stop",
]
HELLO = Hello(
    run="r", stage="s", replica=0, host="h", pid=2, device="cpu", versions={}, rows={"train": 1}, digest="d", shard=""
)


@pytest.fixture
def coordinator():
    admitted = []
    opened = local_coordinator()
    opened.route(lambda hello, connection: admitted.append((hello, connection)))
    opened.admitted = admitted
    yield opened
    for _, connection in admitted:
        connection.close()
    opened.close()


def frame(token, kind, *, magic=b"SPD1", body=b""):
    text = json.dumps({**asdict(HELLO), "kind": kind}).encode()
    return struct.pack(">4s32sIQ", magic, token, len(text), len(body)) + text + body


def dialed(address, way):
    if way == "unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(f"\0{address.nearby}")
    else:
        sock = socket.create_connection((address.host, address.port), timeout=5.0)
    sock.settimeout(5.0)
    return sock


def answer_to(address, way, data):
    """Every byte that comes back before the port hangs up."""
    with dialed(address, way) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            return sock.recv(1 << 16)
        except TimeoutError:
            raise
        except OSError:
            return b""  # the port was faster to hang up


def calls(token):
    """Messages that a stranger may send: none has the token."""
    flipped = [
        bytes(b ^ (1 << bit) if i == at else b for i, b in enumerate(token))
        for at in range(TOKEN_BYTES)
        for bit in range(8)
    ]
    wrong = [
        bytes(TOKEN_BYTES),
        b"\xff" * TOKEN_BYTES,
        token[::-1],
        token[1:] + token[:1],
        *(secrets.token_bytes(TOKEN_BYTES) for _ in range(5)),
    ]
    yield from (frame(one, "hello") for one in flipped)
    yield from (frame(one, kind) for one in wrong for kind in KINDS)
    yield from (frame(wrong[0], kind, body=bytes(1000)) for kind in KINDS)
    yield from [b"", b"SPD1", token, frame(token, "hello")[:40], frame(token, "hello", magic=b"SPD2")]
    yield from [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01" * 30, b"\x80\x04\x95" * 40]


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_whoever_lacks_the_token_gets_not_one_byte(coordinator, way, record_property):
    tried = list(calls(coordinator.token))
    answers = [answer_to(coordinator.address, way, data) for data in tried]
    assert answers == [b""] * len(tried)
    assert coordinator.admitted == []
    record_property(f"unauthenticated calls: by {way}", len(tried))


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_with_the_token_the_same_call_is_let_in(coordinator, way):
    with dialed(coordinator.address, way) as sock:
        sock.sendall(frame(coordinator.token, "hello"))
        deadline = time.monotonic() + 5.0
        while not coordinator.admitted and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [hello for hello, _ in coordinator.admitted] == [HELLO]


def test_a_replica_of_another_run_is_a_stranger(coordinator):
    other = local_coordinator()
    try:
        channel = ReplicaLink.dial(coordinator.address, other.token, connect_timeout_s=5.0, who="replica 0")
        with pytest.raises(ConnectionLostError):
            channel.introduce(HELLO)
        channel.close()
    finally:
        other.close()
    assert coordinator.admitted == []
