"""TLS on the coordinator's port: one certificate a run, nobody else's is taken, and the key is nowhere but in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import socket
import ssl
import stat
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography import x509
from torch import nn
from twin import deal, flat, local_coordinator, make_fit, schema_of

from sparkdeep.errors import ConfigError, CoordinatorUnreachableError, ProtocolError
from sparkdeep.models.program import Program
from sparkdeep.protocol.messages import Address, Hello, Ticket, to_header
from sparkdeep.protocol.tls import TlsSocket, check_tls, client_context, server_context
from sparkdeep.protocol.wire import TOKEN_BYTES
from sparkdeep.replica.link import ReplicaLink
from sparkdeep.spark.doctor import probes
from sparkdeep.stages import coordinator as coordinator_module
from sparkdeep.versions import versions

# Not `from sparkdeep.spark import doctor`, which may be the function.
doctor_module = importlib.import_module("sparkdeep.spark.doctor.doctor")


@pytest.fixture
def coordinator():
    port = local_coordinator(tls=True)
    yield port
    port.close()


HELLO = Hello(
    run="run", stage="stage", replica=0, host="h", pid=1, device="cpu", versions={}, rows={}, digest="", shard=""
)  # fmt: skip


def until(condition, timeout_s=40.0):
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def dial(address, token, timeout_s=20.0):
    return ReplicaLink.dial(address, token, connect_timeout_s=timeout_s, who="replica 0")


def stranger(coordinator, context):
    """A TLS connection of somebody who does not pin anything."""
    sock = socket.create_connection((coordinator.address.host, coordinator.address.port), timeout=5.0)
    return context.wrap_socket(sock)


def trusting(version=ssl.TLSVersion.TLSv1_3):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = version
    return context


# -- who is on the other end ------------------------------------------------------------------------------------------


def trained(tmp_path, *, tls, change_at=None):
    """Parameters, records, the token, and what somebody on the network heard."""
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    y = x[:, :1].copy()
    torch.manual_seed(0)
    program = Program(model=nn.Linear(3, 1), loss=nn.MSELoss(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.1))
    port = local_coordinator(tls=tls)
    tap = Tap(port.address.port, change_at)
    port.address = dataclasses.replace(port.address, port=tap.port, nearby="")
    options = {"epochs": 3, "batch_size": 8, "sync_every": 1, "max_retries": 2, "rounds_per_stage": 100}
    try:
        fit = make_fit(tmp_path, program, deal(x, y, [24, 16]), schema_of(x, y), coordinator=port, **options)
        records = [(r.round, r.loss, r.rows) for r in fit.rounds()]
    finally:
        port.close()
        tap.close()
    assert tap.changed == (change_at is not None)
    return flat(program.model), records, port.token, bytes(tap.heard)


def test_a_fit_over_tls_has_the_bits_of_one_without_and_nothing_of_it_is_readable_on_the_way(tmp_path):
    (plain, plain_records, plain_token, in_the_clear), (locked, records, token, unreadable) = (
        trained(tmp_path, tls=tls) for tls in (False, True)
    )
    assert torch.equal(plain, locked)
    assert plain_records == records
    assert plain_token in in_the_clear  # the tap hears what there is to hear
    assert b"hello" in in_the_clear
    assert len(unreadable) > len(in_the_clear)
    assert token not in unreadable
    assert b"hello" not in unreadable


def test_a_byte_that_is_changed_on_the_way_breaks_the_line_and_the_round_is_repeated_to_the_same_bits(tmp_path):
    (parameters, records, _, _), (expected, undisturbed, _, _) = (
        trained(tmp_path, tls=True, change_at=change_at) for change_at in (6000, None)
    )
    assert torch.equal(parameters, expected)
    assert records == undisturbed


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_what_was_heard_and_is_said_again_admits_nobody_over_tls(tls):
    """Without TLS it would, to a place that is free: whoever hears the wire has the token."""
    port = local_coordinator(tls=tls)
    admitted = []
    port.route(lambda hello, connection: (admitted.append(hello.replica), connection.close()))
    tap = Tap(port.address.port)
    try:
        channel = dial(dataclasses.replace(port.address, port=tap.port, nearby=""), port.token)
        channel.send("hello", to_header(HELLO))
        until(lambda: admitted == [0])
        channel.close()
        with socket.create_connection(("127.0.0.1", port.address.port), timeout=5.0) as sock:
            sock.sendall(bytes(tap.upwards))
            with contextlib.suppress(ConnectionError):
                while sock.recv(1 << 16):
                    continue
    finally:
        tap.close()
        port.close()
    assert admitted == ([0] if tls else [0, 0])


class Tap:
    """Somebody on the network between replicas and driver, who passes everything on and keeps a copy.

    Args:
        target: the driver's port.
        change_at: the first byte that is passed on after so many is changed; None for none.
    """

    def __init__(self, target, change_at=None):
        self.heard = bytearray()
        self.upwards = bytearray()
        self.changed = False
        self._change_at = change_at
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._target = target
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            for source, sink, copy in ((near, far, self.upwards), (far, near, bytearray())):
                threading.Thread(target=self._pass_on, args=(source, sink, copy), daemon=True).start()

    def _pass_on(self, source, sink, copy):
        try:
            while data := source.recv(1 << 16):
                self.heard += data
                copy += data
                if self._change_at is not None and len(self.heard) > self._change_at and not self.changed:
                    self.changed = True
                    data = data[:-1] + bytes([data[-1] ^ 1])
                sink.sendall(data)
        except OSError:
            pass
        finally:
            sink.close()

    def close(self):
        self._server.close()


def test_a_replica_takes_nobody_with_another_certificate_and_says_what_stands_between(coordinator):
    _, certificate = server_context()
    assert certificate != coordinator.address.certificate  # the same name, another key
    wrong = dataclasses.replace(coordinator.address, certificate=certificate)
    began = time.monotonic()
    with pytest.raises(
        ProtocolError, match=r"not this run's coordinator: it showed another certificate.*coordinator_host="
    ):
        dial(wrong, coordinator.token, timeout_s=20.0)
    assert time.monotonic() - began < 15.0  # no use to try again
    dial(coordinator.address, coordinator.token).close()


def test_the_certificate_is_pinned_byte_for_byte_beside_being_trusted(coordinator):
    # Another certificate for the same key and name would pass OpenSSL's check; the pin is what refuses it.
    sock = socket.create_connection((coordinator.address.host, coordinator.address.port), timeout=5.0)
    context = client_context(coordinator.address.certificate)
    with pytest.raises(ProtocolError, match="another certificate"):
        TlsSocket.connect(sock, context, certificate=b"another", timeout_s=5.0)


def test_nothing_older_than_tls_1_3_is_spoken(coordinator):
    with pytest.raises((ssl.SSLError, ConnectionError)):
        stranger(coordinator, trusting(ssl.TLSVersion.TLSv1_2))
    with stranger(coordinator, trusting()) as line:
        assert line.version() == "TLSv1.3"
        assert line.getpeercert(binary_form=True) == coordinator.address.certificate


def test_with_tls_there_is_no_unix_socket(coordinator):
    assert coordinator.address.nearby == ""
    assert len(coordinator._listeners) == 1


def test_certificates_and_their_serial_numbers_are_one_a_run(coordinator):
    known = {server_context()[1] for _ in range(3)} | {coordinator.address.certificate}
    parsed = [x509.load_der_x509_certificate(one) for one in known]
    assert len({one.serial_number for one in parsed}) == len(known) == 4
    assert len({one.public_key().public_numbers() for one in parsed}) == 4
    for one in parsed:  # a clock that is decades off refuses nobody
        assert one.not_valid_before_utc < datetime(2001, 1, 1, tzinfo=UTC)
        assert one.not_valid_after_utc > datetime(2900, 1, 1, tzinfo=UTC)
        assert not one.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize("key", ["spark.ssl.enabled", "spark.network.crypto.enabled", None])
def test_the_doctor_dials_as_a_fit_would(key):
    conf = {"spark.driver.host": "127.0.0.1"} | ({key: "true"} if key else {})
    with doctor_module._listening(conf, "sparkdeep-doctor", None, range(1)) as (job, findings):
        assert bool(job.certificate) == bool(key)
        seconds, problem = probes._dial(job, 0, versions())
        assert not findings
        assert problem == ""
        assert 0 < seconds < 20.0
        if key:
            stranger = dataclasses.replace(job, certificate=server_context()[1])
            assert "another certificate" in probes._dial(stranger, 0, versions())[1]
            assert repr(job.token)[2:-1] not in repr(job)


def test_the_doctor_names_the_extra_that_a_fit_would_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    conf = {"spark.driver.host": "127.0.0.1", "spark.ssl.enabled": "true"}
    with doctor_module._listening(conf, "sparkdeep-doctor", None, range(1)) as (job, [finding]):
        assert job.host == ""
        assert finding.level == "fail"
        assert "pip install 'sparkdeep[tls]'" in finding.seen


# -- deadlines --------------------------------------------------------------------------------------------------------


def test_a_driver_that_never_answers_the_handshake_meets_the_replicas_deadline():
    _, certificate = server_context()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = Address(host="127.0.0.1", port=silent.getsockname()[1], certificate=certificate)
        began = time.monotonic()
        with pytest.raises(CoordinatorUnreachableError, match="TLS handshake"):
            dial(address, bytes(TOKEN_BYTES), timeout_s=0.6)
        assert time.monotonic() - began < 15.0


def test_a_port_without_tls_is_no_coordinator_to_a_replica_that_wants_it():
    plain = local_coordinator()
    _, certificate = server_context()
    address = dataclasses.replace(plain.address, nearby="", certificate=certificate)
    with pytest.raises(CoordinatorUnreachableError):
        dial(address, plain.token, timeout_s=0.6)
    plain.close()


@pytest.mark.parametrize("piece", [b"", b"\x16\x03\x01"], ids=["silence", "a byte now and then"])
def test_a_stranger_who_does_not_finish_the_handshake_holds_no_thread_for_long(coordinator, monkeypatch, piece):
    monkeypatch.setattr(coordinator_module, "_HANDSHAKE_S", 0.6)
    with socket.create_connection((coordinator.address.host, coordinator.address.port), timeout=5.0) as sock:
        began = time.monotonic()
        for byte in piece:
            sock.sendall(bytes([byte]))
            time.sleep(0.1)
        assert sock.recv(100) == b""
        assert 0.4 < time.monotonic() - began < 4.5
    until(lambda: not [t for t in threading.enumerate() if t.name == "sparkdeep-hello"])


def test_one_slow_handshake_does_not_keep_others_waiting(coordinator):
    met = threading.Event()
    coordinator.route(lambda _hello, _connection: met.set())
    with socket.create_connection((coordinator.address.host, coordinator.address.port), timeout=5.0):
        began = time.monotonic()
        dial(coordinator.address, coordinator.token, timeout_s=15.0).close()
        assert time.monotonic() - began < 10.0


# -- the key and the token ----------------------------------------------------------------------------------------------


def test_the_key_lies_on_disk_locked_for_a_moment_in_a_folder_of_ones_own_and_then_nowhere(monkeypatch):
    seen = []
    real = ssl.SSLContext.load_cert_chain

    def look(self, path, *rest, **options):
        path = Path(path)
        modes = [stat.S_IMODE(one.stat().st_mode) for one in (path.parent, path)]
        seen.append((path, modes, path.read_bytes(), options["password"]))
        return real(self, path, *rest, **options)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", look)
    server_context()
    [(path, modes, content, password)] = seen
    assert modes == [0o700, 0o600]
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in content
    assert content.count(b"PRIVATE KEY") == 2  # begin and end of the locked one, and no other
    assert password not in content
    assert not path.parent.exists()
    server_context()
    assert seen[1][3] != password


def test_replicas_need_no_package_for_it(coordinator, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    dial(coordinator.address, coordinator.token).close()


def test_without_its_package_the_extra_is_named(monkeypatch):
    check_tls()
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for need in (check_tls, server_context, lambda: local_coordinator(tls=True)):
        with pytest.raises(ConfigError, match=r"pip install 'sparkdeep\[tls\]'.*tls=False"):
            need()


def test_what_carries_the_token_does_not_show_it(coordinator):
    ticket = Ticket(address=coordinator.address, token=coordinator.token, run="run", stage="stage")
    shown = repr(ticket) + repr([ticket]) + f"{ticket}"
    assert "run='run'" in shown
    assert repr(coordinator.token)[2:-1] not in shown
    assert coordinator.token.hex() not in shown
    channel = dial(coordinator.address, coordinator.token)
    assert repr(coordinator.token)[2:-1] not in repr(channel) + repr(channel._connection) + repr(coordinator)
    channel.close()
