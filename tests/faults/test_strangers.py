"""Calls without the run's token, counted, against a port behind which a fit is at work: every one refused, and the fit goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import secrets
import socket
import ssl
import struct
import threading
import time
from collections import Counter

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from twin import deal, flat, local_coordinator, make_fit, schema_of

from sparkdeep.errors import ProtocolError
from sparkdeep.models.program import Program
from sparkdeep.protocol.messages import Hello, to_header
from sparkdeep.protocol.tls import server_context
from sparkdeep.protocol.wire import TOKEN_BYTES, ConnectionLostError
from sparkdeep.replica.link import ReplicaLink
from sparkdeep.stages import coordinator as coordinator_module
from sparkdeep.versions import versions

EACH = 12
SLOW = 24
SIZES = [24, 16]
HELLO = b'{"kind": "hello"}'


def frame(token, header=HELLO, body_bytes=0, *, header_bytes=None):
    size = len(header) if header_bytes is None else header_bytes
    return struct.pack(">4s32sIQ", b"SPD1", token, size, body_bytes) + header


def anyone():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def hears_nothing(answer):
    """No byte, or what TLS itself says to who does not speak it: an alert of seven bytes."""
    return answer == b"" or (answer[:1] == b"\x15" and len(answer) == 7)


class Strangers:
    """What those without the token try."""

    def __init__(self, port):
        self.port = port
        self.tls = bool(port.address.certificate)
        self.place = (port.address.host, port.address.port)

    def is_refused(self, data, *, wrapped):
        with contextlib.suppress(ConnectionError, ssl.SSLError), socket.create_connection(self.place, 10.0) as sock:
            line = anyone().wrap_socket(sock) if wrapped else sock
            line.sendall(data)
            return hears_nothing(line.recv(1 << 16))
        return True  # the port was faster to hang up

    def tries(self):
        token = self.port.token
        say = functools.partial(self.is_refused, wrapped=self.tls)
        bare = functools.partial(self.is_refused, wrapped=False)
        return {
            "no token": lambda: say(frame(bytes(TOKEN_BYTES))),
            "a guessed token": lambda: say(frame(secrets.token_bytes(TOKEN_BYTES))),
            "one wrong bit": lambda: say(frame(bytes([token[0] ^ 1]) + token[1:])),
            "noise": lambda: say(secrets.token_bytes(400)),
            "a web browser": lambda: bare(b"GET / HTTP/1.1\r\nHost: driver\r\n\r\n" * 3),
            "a header of 4 GiB": lambda: say(frame(bytes(TOKEN_BYTES), b"", header_bytes=(1 << 32) - 1)),
            "a body of 2^64 bytes": lambda: say(frame(bytes(TOKEN_BYTES), body_bytes=(1 << 64) - 1)),
            # With the very token: no TLS on a port that speaks it, and the other way round.
            "the other language": lambda: self.is_refused(frame(token), wrapped=not self.tls),
        }


class Insiders:
    """What those try who have the token and yet no place: a zombie, or who recorded the wire of a run without TLS."""

    def __init__(self, port):
        self.port = port
        self.hello = {
            "stage": "earlier", "replica": 0, "host": "h", "pid": 1, "device": "cpu", "versions": versions(),
            "rows": {}, "digest": "", "shard": "",
        }  # fmt: skip

    def is_refused(self, data):
        channel = ReplicaLink.dial(self.port.address, self.port.token, connect_timeout_s=5.0, who="insider")
        try:
            channel._connection._write(memoryview(data), 5.0)
            channel.command()
        except ProtocolError as error:
            return "the driver refused this replica" in str(error)
        finally:
            channel.close()
        return False

    def tries(self):
        def words(kind, **changes):
            return json.dumps({**to_header(Hello(**{**self.hello, **changes})), "kind": kind}).encode()

        token = self.port.token
        return {
            "a replayed hello": lambda: self.is_refused(frame(token, words("hello", run="this"))),
            "a hello of another run": lambda: self.is_refused(frame(token, words("hello", run="another"))),
            "another word than hello": lambda: self.is_refused(frame(token, words("update", run="this"))),
            "a hello without its fields": lambda: self.is_refused(frame(token, HELLO)),
            "a header of 2 GiB, with the token": lambda: self.is_hung_up_on(frame(token, b"", header_bytes=1 << 31)),
            "a body of 2^60 bytes, with the token": lambda: self.is_refused(
                frame(token, words("hello", run="this"), body_bytes=1 << 60)
            ),
        }

    def is_hung_up_on(self, data):
        channel = ReplicaLink.dial(self.port.address, self.port.token, connect_timeout_s=5.0, who="insider")
        try:
            channel._connection._write(memoryview(data), 5.0)
            channel.command()
        except ConnectionLostError:
            return True
        finally:
            channel.close()
        return False


class SlowOnes:
    """They hold connections open, with a byte now and then."""

    def __init__(self, place):
        self.dropped = 0
        self._socks = [socket.create_connection(place, timeout=10.0) for _ in range(SLOW)]
        self._thread = threading.Thread(target=self._drip, daemon=True)
        self._thread.start()

    def _drip(self):
        deadline = time.monotonic() + 60.0
        left = list(self._socks)
        while left and time.monotonic() < deadline:
            for sock in list(left):
                sock.setblocking(False)
                try:
                    sock.send(b"\x16")
                    over = hears_nothing(sock.recv(100))
                except BlockingIOError:
                    over = False
                except OSError:
                    over = True
                if over:
                    left.remove(sock)
                    self.dropped += 1
            time.sleep(0.1)

    def wait(self):
        self._thread.join(timeout=65.0)
        for sock in self._socks:
            sock.close()


def trained(tmp_path, port, *, after_round=lambda number: None):
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(sum(SIZES), 3)).astype(np.float32)
    y = x[:, :1].copy()
    program = Program(model=nn.Linear(3, 1), loss=nn.MSELoss(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.1))
    options = {"epochs": 2, "batch_size": 4, "sync_every": 1, "rounds_per_stage": 3, "max_retries": 0}
    fit = make_fit(tmp_path, program, deal(x, y, SIZES), schema_of(x, y), coordinator=port, **options)
    records = []
    for record in fit.rounds():
        records.append((record.round, record.loss, record.rows))
        after_round(record.round)
    return flat(program.model), records


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_every_call_without_the_token_or_a_place_is_refused_and_the_fit_goes_on_to_the_same_bits(
    tmp_path, monkeypatch, tls, record_property
):
    monkeypatch.setattr(coordinator_module, "_HANDSHAKE_S", 6.0)
    with contextlib.closing(local_coordinator()) as undisturbed:
        expected = trained(tmp_path, undisturbed)
    tried: Counter[str] = Counter()
    refused: Counter[str] = Counter()

    def attack(name, is_refused):
        for _ in range(EACH):
            tried[name] += 1
            refused[name] += is_refused()

    with contextlib.closing(local_coordinator(tls=tls)) as port:
        slow = []
        tries = {**Strangers(port).tries(), **Insiders(port).tries()}
        if tls:
            tries["the run's replica, met with another certificate"] = functools.partial(other_certificate, port)
        threads = [threading.Thread(target=attack, args=one) for one in tries.items()]
        before = psutil.Process().memory_info().rss

        def after_round(number):
            if number == 1:
                slow.append(SlowOnes((port.address.host, port.address.port)))
                for thread in threads:
                    thread.start()
            deadline = time.monotonic() + 5.0
            while tried.total() < 8 * number and time.monotonic() < deadline:  # rounds and calls keep step
                time.sleep(0.01)

        got = trained(tmp_path, port, after_round=after_round)
        meanwhile = tried.total()
        for thread in threads:
            thread.join(timeout=60.0)
        slow[0].wait()
        tried["a byte now and then"], refused["a byte now and then"] = SLOW, slow[0].dropped
        grown = psutil.Process().memory_info().rss - before
    print(f"\n{tried.total()} tried ({meanwhile} while the fit trained), {refused.total()} refused: {dict(tried)}")
    record_property(f"unauthenticated calls: to the port of a running fit, {'TLS' if tls else 'plain'}", tried.total())
    assert refused == tried
    assert tried.total() == len(tries) * EACH + SLOW
    assert meanwhile > 80
    assert torch.equal(got[0], expected[0])
    assert got[1] == expected[1]
    assert grown < 128 << 20  # of the gigabytes that were announced nothing was taken


def other_certificate(port):
    address = dataclasses.replace(port.address, certificate=server_context()[1])
    try:
        ReplicaLink.dial(address, port.token, connect_timeout_s=5.0, who="replica").close()
    except ProtocolError as error:
        return "showed another certificate" in str(error)
    return False
