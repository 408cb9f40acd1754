"""The driver's port: it admits this run's replicas, and outlives whatever strangers send."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import socket
import struct
import sys
import threading
import time

import pytest
from torch import nn
from twin import local_coordinator

from sparkdeep.errors import ConfigError, CoordinatorUnreachableError, ProtocolError
from sparkdeep.optim.averaging import Averaging
from sparkdeep.protocol.messages import Address, Hello, to_header
from sparkdeep.protocol.wire import TOKEN_BYTES
from sparkdeep.replica.link import ReplicaLink
from sparkdeep.stages import coordinator as coordinator_module
from sparkdeep.stages.collector import Plane
from sparkdeep.stages.coordinator import Coordinator, parse_ports
from sparkdeep.stages.stage import Stage
from sparkdeep.stages.star import Star
from sparkdeep.tensors.encoding import codec_named
from sparkdeep.tensors.parameters import Layout
from sparkdeep.versions import versions


@pytest.fixture
def coordinator():
    port = local_coordinator()
    yield port
    port.close()


@pytest.fixture
def stage(coordinator):
    opened = Stage(
        run="run",
        name="this-stage",
        num_replicas=2,
        plane=Plane(
            averaging=Averaging(layout=Layout.of(nn.Linear(1, 1)), codec=codec_named("identity"), wide=False),
            collector=Star,
        ),
        stall_timeout_s=5.0,
        on_beat=lambda _replica, _rows: None,
        on_log=lambda _replica, _line: None,
    )
    coordinator.route(opened.admit)
    yield opened
    opened.abort()


def hello(replica=0, **changes):
    parts = {
        "run": "run",
        "stage": "this-stage",
        "replica": replica,
        "host": "h",
        "pid": 1,
        "device": "cpu",
        "versions": versions(),
        "rows": {"train": 1, "validation": 0},
        "digest": "d",
        "shard": "",
    }
    return Hello(**{**parts, **changes})


def dial(coordinator, token=None):
    return ReplicaLink.dial(coordinator.address, token or coordinator.token, connect_timeout_s=20.0, who="replica 0")


def until(condition, timeout_s=40.0):
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def refusal(coordinator, introduction):
    channel = dial(coordinator)
    with pytest.raises(ProtocolError) as caught:
        channel.introduce(introduction)
    channel.close()
    return str(caught.value)


# -- who is admitted --------------------------------------------------------------------------------------------------


def test_replicas_of_the_open_stage_are_admitted(coordinator, stage):
    for replica in (1, 0):
        dial(coordinator).send("hello", to_header(hello(replica)))
    until(lambda: stage.hellos.keys() == {0, 1})
    assert stage.hellos[1].replica == 1


@pytest.mark.fault(rows=[18], phases="TR")
def test_a_zombie_of_another_stage_hears_why_it_is_refused(coordinator, stage):
    assert "stage 'earlier' of run 'run' is over" in refusal(coordinator, hello(stage="earlier"))
    assert "stage 'this-stage' of run 'other' is over" in refusal(coordinator, hello(run="other"))
    assert not stage.hellos


@pytest.mark.fault(rows=[18], phases="TR")
def test_a_second_replica_of_the_same_number_is_refused(coordinator, stage):
    first = dial(coordinator)
    first.send("hello", to_header(hello(0, host="first")))
    until(lambda: 0 in stage.hellos)
    assert "no place for replica 0" in refusal(coordinator, hello(0, host="second"))
    assert "no place for replica 2" in refusal(coordinator, hello(2))
    assert "no place for replica -1" in refusal(coordinator, hello(-1))
    assert stage.hellos[0].host == "first"


def test_nobody_is_admitted_while_no_stage_is_open(coordinator):
    assert "no stage is open" in refusal(coordinator, hello())


def test_nobody_is_admitted_to_an_aborted_stage(coordinator, stage):
    stage.abort()
    assert "no place" in refusal(coordinator, hello())


def test_the_first_frame_must_be_a_hello(coordinator, stage):
    channel = dial(coordinator)
    channel.send("update", {"round": 1})
    with pytest.raises(ProtocolError, match="expected a hello, got 'update'"):
        channel.command()
    channel.close()


# -- strangers --------------------------------------------------------------------------------------------------------


def answer_to(coordinator, data, *, hang_up=True):
    """All bytes that come back for `data`, until the port closes the connection."""
    with socket.create_connection((coordinator.address.host, coordinator.address.port), timeout=5.0) as sock:
        try:
            sock.sendall(data)
            if hang_up:
                sock.shutdown(socket.SHUT_WR)
            return sock.recv(1 << 16)
        except TimeoutError:
            raise
        except OSError:
            return b""  # the port was faster to hang up


def test_a_stranger_gets_not_one_byte(coordinator, stage):
    good = b'{"kind": "hello"}'
    wrong = struct.pack(">4s32sIQ", b"SPD1", bytes(TOKEN_BYTES), len(good), 0) + good
    for data in (wrong, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3, b"\x16\x03\x01" * 30, b""):
        assert answer_to(coordinator, data) == b""
    assert not stage.hellos


def test_silence_is_hung_up_on(coordinator, stage, monkeypatch):
    monkeypatch.setattr(coordinator_module, "_HANDSHAKE_S", 0.3)
    began = time.monotonic()
    assert answer_to(coordinator, b"SPD1", hang_up=False) == b""
    assert time.monotonic() - began < 3.0


def test_a_byte_now_and_then_does_not_hold_a_thread(coordinator, stage, monkeypatch):
    monkeypatch.setattr(coordinator_module, "_HANDSHAKE_S", 0.6)
    with socket.create_connection((coordinator.address.host, coordinator.address.port), timeout=5.0) as sock:
        began = time.monotonic()
        with pytest.raises(OSError):  # noqa: PT012 (the port hangs up at some byte)
            for _ in range(40):
                sock.sendall(b"S")
                time.sleep(0.3)
        assert time.monotonic() - began < 11.0


def test_a_body_announced_with_the_hello_is_refused_unread(coordinator, stage):
    text = b'{"kind": "hello"}'
    head = struct.pack(">4s32sIQ", b"SPD1", coordinator.token, len(text), 1 << 60) + text
    assert b"expected a hello" in answer_to(coordinator, head)


def test_two_hundred_malformed_inputs_leave_the_port_serving(coordinator, stage, monkeypatch, record_property):
    monkeypatch.setattr(coordinator_module, "_HANDSHAKE_S", 1.0)
    generator = random.Random(0)
    text = json.dumps({**to_header(hello(0, stage="never")), "kind": "hello"}).encode()
    valid = struct.pack(">4s32sIQ", b"SPD1", coordinator.token, len(text), 0) + text

    def mangled():
        if generator.random() < 0.3:
            return generator.randbytes(generator.randrange(0, 300))
        data = bytearray(valid)
        for _ in range(generator.randrange(1, 6)):
            place = generator.randrange(len(data))
            kind = generator.randrange(3)
            if kind == 0:
                data[place] = generator.randrange(256)
            elif kind == 1:
                del data[place : place + generator.randrange(1, 40)]
            else:
                data[place:place] = generator.randbytes(generator.randrange(1, 40))
            if not data:
                break
        return bytes(data)

    inputs = [mangled() for _ in range(200)]
    record_property("fuzz inputs: the coordinator's port", len(inputs))
    threads = [
        threading.Thread(target=lambda part=inputs[i::8]: [answer_to(coordinator, data) for data in part])
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20.0)
    assert not stage.hellos
    dial(coordinator).send("hello", to_header(hello(1)))
    until(lambda: 1 in stage.hellos)
    until(lambda: not [t for t in threading.enumerate() if t.name == "sparkdeep-hello"])


# -- ports and addresses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "ports"),
    [
        (None, range(1)),
        (0, range(1)),
        (7077, range(7077, 7078)),
        ("7077", range(7077, 7078)),
        ("7077-7080", range(7077, 7081)),
        (" 7077 - 7080 ", range(7077, 7081)),
        ((7077, 7080), range(7077, 7081)),
        ([7077, 7077], range(7077, 7078)),
    ],
)
def test_ports_are_a_number_a_pair_or_a_range(value, ports):
    assert parse_ports(value) == ports


@pytest.mark.parametrize(
    "value", [-1, 65536, "a", "", "1-", "1-2-3", "²", (2, 1), (0, 5), (1, 2, 3), (1, "2"), 70.5, True, False]
)
def test_what_is_no_port_is_refused_by_its_setting(value):
    with pytest.raises(ConfigError, match=r"coordinator_port=.*from 1 to 65535, a pair \(first, last\) or 'a-b'"):
        parse_ports(value)


def test_the_next_free_port_of_a_range_is_taken_and_a_full_range_names_the_setting():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1 port {port}: .*Set coordinator_port= to a free port"):
            Coordinator(bind_host="127.0.0.1", advertised_host="127.0.0.1", ports=range(port, port + 1))
        if port + 20 < 65536:
            free = Coordinator(bind_host="127.0.0.1", advertised_host="127.0.0.1", ports=range(port, port + 20))
            assert port < free.address.port < port + 20
            free.close()


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid"])
def test_an_address_of_another_machine_names_the_setting(host):
    with pytest.raises(ConfigError, match=rf"cannot listen on {host} .*spark.driver.bindAddress"):
        Coordinator(bind_host=host, advertised_host=host, ports=range(1))


def test_an_unreachable_address_names_both_settings():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address(host="127.0.0.1", port=server.getsockname()[1])
    with pytest.raises(CoordinatorUnreachableError, match=r"coordinator_host=.*coordinator_port=") as caught:
        ReplicaLink.dial(address, bytes(TOKEN_BYTES), connect_timeout_s=0.3, who="replica 3 on worker-7")
    assert f"replica 3 on worker-7 cannot reach the driver's coordinator at 127.0.0.1:{address.port}" in str(
        caught.value
    )


def test_closing_frees_the_port_at_once_and_twice_is_once(coordinator):
    for listener in coordinator._listeners:
        listener.settimeout(60.0)  # they would look for themselves only then
    time.sleep(0.5)
    began = time.monotonic()
    coordinator.close()
    coordinator.close()
    assert time.monotonic() - began < 4.0
    with socket.create_server(("127.0.0.1", coordinator.address.port)):
        pass


def test_tokens_differ_between_coordinators(coordinator):
    other = local_coordinator()
    assert other.token != coordinator.token
    assert len(other.token) == TOKEN_BYTES
    other.close()


# -- on the driver's own host ---------------------------------------------------------------------------------------

nearby_only = pytest.mark.skipif(sys.platform != "linux", reason="sockets without a file are Linux's")


@nearby_only
def test_replicas_of_the_same_host_come_by_the_unix_socket_and_others_by_tcp(coordinator, stage):
    near = dial(coordinator)
    assert near.local_host == coordinator.address.host  # what other replicas of a ring can reach
    near.send("hello", to_header(hello(0)))
    # Another host, or another container: no such socket there.
    elsewhere = dataclasses.replace(coordinator.address, nearby="sparkdeep-of-another-host")
    far = ReplicaLink.dial(elsewhere, coordinator.token, connect_timeout_s=2.0, who="replica 1")
    far.send("hello", to_header(hello(1)))
    until(lambda: stage.hellos.keys() == {0, 1})
    assert [line.connection.peer.startswith("a process") for _, line in sorted(stage._links.items())] == [True, False]


@nearby_only
def test_a_stranger_on_the_unix_socket_gets_not_one_byte_either(coordinator, stage):
    good = b'{"kind": "hello"}'
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5.0)
        sock.connect(f"\0{coordinator.address.nearby}")
        sock.sendall(struct.pack(">4s32sIQ", b"SPD1", bytes(TOKEN_BYTES), len(good), 0) + good)
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):  # the coordinator was faster to hang up
            assert sock.recv(1 << 16) == b""
    assert not stage.hellos


@nearby_only
def test_the_unix_socket_is_gone_when_the_coordinator_closes(coordinator):
    coordinator.close()
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(ConnectionRefusedError):
        sock.connect(f"\0{coordinator.address.nearby}")
