"""Frames: what goes in comes out, and what does not belong is refused before anything is allocated."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkdeep.errors import ProtocolError
from sparkdeep.protocol.messages import Failure, Hello, Update, parse, to_header
from sparkdeep.protocol.tls import TlsSocket, client_context, server_context
from sparkdeep.protocol.wire import HEADER_LIMIT_BYTES, TOKEN_BYTES, Connection, ConnectionLostError

TOKEN = bytes(range(TOKEN_BYTES))
PREFIX = struct.Struct(">4s32sIQ")


def ends():
    """Two ends of a real TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
    return left, right


def tls_ends():
    """The same, encrypted; the driver's end second."""
    left, right = ends()
    serving, certificate = server_context()
    opened = []
    driver = threading.Thread(target=lambda: opened.append(TlsSocket.open(right, serving, check=lambda: None)))
    driver.start()
    replica = TlsSocket.connect(left, client_context(certificate), certificate=certificate, timeout_s=5.0)
    driver.join(timeout=5.0)
    return replica, opened[0]


@pytest.fixture(params=[ends, tls_ends], ids=["plain", "tls"])
def pair(request):
    left, right = request.param()
    connections = Connection(left, TOKEN), Connection(right, TOKEN)
    yield connections
    for connection in connections:
        connection.close()


@pytest.fixture
def raw():
    """A bare socket that says what it likes, and a connection that listens."""
    left, right = ends()
    connection = Connection(right, TOKEN)
    yield left, connection
    left.close()
    connection.close()


def frame(header: bytes, body_bytes=0, *, token=TOKEN, magic=b"SPD1", header_bytes=None):
    size = len(header) if header_bytes is None else header_bytes
    return PREFIX.pack(magic, token, size, body_bytes) + header


HEADERS = st.dictionaries(
    st.text(max_size=8).filter(lambda k: k != "kind"),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    max_size=5,
)


@settings(max_examples=50, deadline=None)
@given(kind=st.text(min_size=1, max_size=10), header=HEADERS, bodies=st.lists(st.binary(max_size=5000), max_size=3))
def test_frames_come_out_as_they_went_in(kind, header, bodies):
    left, right = ends()
    a, b = Connection(left, TOKEN), Connection(right, TOKEN)
    try:
        a.send(kind, header, *bodies)
        a.send("next")
        got = b.receive(timeout_s=5.0)
        assert (got.kind, got.header, got.body_bytes) == (kind, header, sum(map(len, bodies)))
        assert b.read_body(got.body_bytes, limit_bytes=1 << 20, timeout_s=5.0) == b"".join(bodies)
        assert b.receive(timeout_s=5.0).kind == "next"
    finally:
        a.close()
        b.close()


def test_large_bodies_stream_in_pieces_while_the_other_end_reads(pair):
    a, b = pair
    body = bytes(range(256)) * (1 << 16)  # 16 MiB, four times the socket's buffer
    sender = threading.Thread(target=a.send, args=("body", {}, body))
    sender.start()
    got = b.receive(timeout_s=5.0)
    into = bytearray(got.body_bytes)
    for start in range(0, len(into), 1 << 20):
        b.read_into(memoryview(into)[start : start + (1 << 20)], timeout_s=5.0)
    sender.join(timeout=10.0)
    assert into == body


def test_frames_of_several_threads_never_mix(pair):
    a, b = pair
    bodies = [bytes([i]) * 200_000 for i in range(8)]
    threads = [threading.Thread(target=a.send, args=(f"{i}", {}, body)) for i, body in enumerate(bodies)]
    for thread in threads:
        thread.start()
    for _ in bodies:
        got = b.receive(timeout_s=5.0)
        assert b.read_body(got.body_bytes, limit_bytes=1 << 20, timeout_s=5.0) == bodies[int(got.kind)]
    for thread in threads:
        thread.join(timeout=5.0)


@pytest.mark.parametrize(
    "start",
    [frame(b'{"kind": "x"}', token=bytes(TOKEN_BYTES)), frame(b'{"kind": "x"}', magic=b"HTTP"), b"GET / " * 10],
    ids=["token", "magic", "http"],
)
def test_a_stranger_is_refused_and_hears_nothing(raw, start):
    sock, connection = raw
    sock.sendall(start)
    with pytest.raises(ProtocolError, match="does not carry this run's token"):
        connection.receive(timeout_s=2.0)
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sock.recv(1)


def test_a_header_that_is_too_long_is_refused_before_it_is_read(raw):
    sock, connection = raw
    sock.sendall(frame(b"", header_bytes=(1 << 32) - 1))
    began = time.monotonic()
    with pytest.raises(ProtocolError, match=rf"header of {(1 << 32) - 1} bytes exceeds {HEADER_LIMIT_BYTES}"):
        connection.receive(timeout_s=30.0)
    assert time.monotonic() - began < 15.0


def test_a_body_that_is_too_long_is_refused_before_it_is_allocated(raw):
    sock, connection = raw
    sock.sendall(frame(b'{"kind": "state"}', body_bytes=1 << 62))
    got = connection.receive(timeout_s=2.0)
    with pytest.raises(ProtocolError, match=rf"body of {1 << 62} bytes .* exceeds its limit of 4096"):
        connection.read_body(got.body_bytes, limit_bytes=4096, timeout_s=2.0)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (b"\xff\xfe\xfa", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b"[]", "no kind"),
        (b"{}", "no kind"),
        (b'{"kind": 3}', "no kind"),
        (b'{"kind": "x", "n": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_headers_that_are_no_message_are_refused(raw, header, complaint):
    sock, connection = raw
    sock.sendall(frame(header))
    with pytest.raises(ProtocolError, match=complaint):
        connection.receive(timeout_s=2.0)


@pytest.mark.parametrize("length", [0, 3, 47, 50])
def test_half_a_frame_and_silence_meet_the_deadline(raw, length):
    sock, connection = raw
    sock.sendall(frame(b'{"kind": "hello"}')[:length])
    began = time.monotonic()
    with pytest.raises(ConnectionLostError, match=r"sent nothing for 0\.4 s"):
        connection.receive(timeout_s=0.4)
    assert 0.3 < time.monotonic() - began < 15.0


def test_an_end_in_the_middle_of_a_body_is_a_lost_connection(raw):
    sock, connection = raw
    sock.sendall(frame(b'{"kind": "state"}', body_bytes=100) + b"x" * 40)
    got = connection.receive(timeout_s=2.0)
    sock.close()
    with pytest.raises(ConnectionLostError, match=r"closed the connection|broke"):
        connection.read_body(got.body_bytes, limit_bytes=4096, timeout_s=2.0)


def test_a_reader_that_takes_nothing_meets_the_senders_deadline(pair):
    a, _ = pair
    with pytest.raises(ConnectionLostError, match=r"took nothing for 0\.4 s"):
        a.send("body", {}, bytes(64 << 20), timeout_s=0.4)


def test_a_line_that_crawls_meets_the_limit_though_it_is_never_silent(raw):
    sock, connection = raw
    heard = []

    def late():
        heard.append(time.monotonic())
        raise TimeoutError("too slow")

    def crawl():
        with contextlib.suppress(OSError):  # the other end gives up
            for _ in range(2000):
                sock.sendall(b"x")
                time.sleep(0.02)

    sock.sendall(frame(b'{"kind": "state"}', body_bytes=4000))
    got = connection.receive(timeout_s=2.0)
    threading.Thread(target=crawl, daemon=True).start()
    began = time.monotonic()
    connection.until, connection.late = began + 0.3, late
    with pytest.raises(TimeoutError, match="too slow"):
        connection.read_body(got.body_bytes, limit_bytes=4096, timeout_s=10.0)
    assert 0.25 < heard[0] - began < 10.0


def test_a_wait_can_be_given_up(pair):
    class GivenUpError(Exception):
        pass

    def check():
        raise GivenUpError

    pair[0].check = check
    with pytest.raises(GivenUpError):
        pair[0].receive(timeout_s=60.0)


def test_a_sign_of_life_never_interrupts_a_frame_on_its_way(pair):
    a, b = pair
    sender = threading.Thread(target=a.send, args=("body", {}, bytes(16 << 20)))
    sender.start()
    time.sleep(0.05)
    for _ in range(20):
        a.try_send("alive")
    got = b.receive(timeout_s=5.0)
    assert b.read_body(got.body_bytes, limit_bytes=1 << 30, timeout_s=5.0) == bytes(16 << 20)
    sender.join(timeout=5.0)
    a.try_send("alive")
    assert b.receive(timeout_s=5.0).kind == "alive"


def test_both_ends_read_and_write_at_once_and_beat_beside(pair):
    """As a replica does: a round's update goes out and the parameters come in, and a beat is tried now and then."""
    rounds, size = 12, 1 << 20
    got, done = {}, threading.Event()

    bodies = {name: [bytes([i, j]) * (size // 2) for j in range(rounds)] for i, name in enumerate("ab")}
    ends_by_name = dict(zip("ab", pair, strict=True))

    def write(name):
        for body in bodies[name]:
            ends_by_name[name].send("body", {}, body, timeout_s=10.0)
        ends_by_name[name].send("end")

    def receive(name):
        got[name] = []
        while (frame := ends_by_name[name].receive(timeout_s=10.0)).kind != "end":
            if frame.kind == "body":
                got[name].append(ends_by_name[name].read_body(size, limit_bytes=size, timeout_s=10.0))

    def beat(name):
        while not done.wait(0.001):
            ends_by_name[name].try_send("beat", {"rows": 1})

    workers = [threading.Thread(target=task, args=(name,)) for task in (write, receive) for name in "ab"]
    beats = [threading.Thread(target=beat, args=(name,), daemon=True) for name in "ab"]
    for thread in [*beats, *workers]:
        thread.start()
    for thread in workers:
        thread.join(timeout=30.0)
    done.set()
    for thread in beats:
        thread.join(timeout=5.0)
    assert got == {"a": bodies["b"], "b": bodies["a"]}


def test_closing_wakes_the_thread_that_reads(pair):
    caught = []

    def read():
        try:
            pair[0].receive(timeout_s=30.0)
        except ConnectionLostError as error:
            caught.append(error)

    pair[0]._socket.settimeout(30.0)  # it would look for itself only then
    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.1)
    pair[0].close()
    thread.join(timeout=10.0)
    assert not thread.is_alive()
    assert len(caught) == 1
    with pytest.raises(ConnectionLostError):
        pair[0].send("late")


def test_what_has_come_already_is_readable_though_the_socket_is_silent(pair):
    a, b = pair
    assert not b.readable()
    two = frame(b'{"kind": "first"}') + frame(b'{"kind": "second"}')
    assert a._socket.send(memoryview(two)) == len(two)  # one record of TLS
    assert b.receive(timeout_s=5.0).kind == "first"
    assert b.readable()
    assert b.receive(timeout_s=5.0).kind == "second"
    assert not b.readable()
    a.close()
    deadline = time.monotonic() + 5.0
    while not b.readable() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert b.readable()  # the end


# -- typed headers ----------------------------------------------------------------------------------------------------


def update(**changes):
    header = {
        "round": 1,
        "rows": 8,
        "weight": 8.0,
        "steps": 2,
        "loss_sum": 0.5,
        "finite": True,
        "sections": ["exp_avg"],
        "buffer_bytes": 10,
        "compute_s": 0.1,
        "input_s": 0.0,
        "logged": {"accuracy": 0.5},
        "changed": [],
    }
    return {**header, **changes}


def test_typed_headers_survive_json():
    message = Update(**update())
    assert parse(Update, json.loads(json.dumps(to_header(message)))) == message
    failure = Failure(cause="user", message="m", traceback="t\nü", where="w")
    assert parse(Failure, json.loads(json.dumps(to_header(failure)))) == failure


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("round", "1"),
        ("round", True),
        ("round", 1.0),
        ("rows", None),
        ("weight", float("nan")),
        ("weight", "8"),
        ("finite", 1),
        ("sections", "exp_avg"),
        ("sections", [1]),
        ("buffer_bytes", []),
    ],
)
def test_a_field_of_the_wrong_type_is_named(field, value):
    with pytest.raises(ProtocolError, match=rf"Update\.{field} is "):
        parse(Update, update(**{field: value}))


def test_missing_and_unknown_fields_are_named():
    header = update(extra=1)
    del header["rows"]
    with pytest.raises(ProtocolError, match=r"\['extra', 'rows'\] are missing or unknown"):
        parse(Update, header)
    with pytest.raises(ProtocolError, match="Hello"):
        parse(Hello, {})
