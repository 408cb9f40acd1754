"""Targets on the line: frames, the coordinator's port, a stage before fake replicas, a replica before a fake driver."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from functools import partial
from types import SimpleNamespace

import torch
from fuzzing import Target
from mutating import PREFIX, frame, frames_of, mutate_bytes, mutate_frames, with_checksum
from torch import nn
from twin import local_coordinator

from sparkdeep.models.validation import merge_scores
from sparkdeep.optim.asynchronous import Asynchronous
from sparkdeep.optim.averaging import Averaging
from sparkdeep.protocol.messages import Hello, Open, RoundSpec, Update, to_header
from sparkdeep.protocol.orders import Globals, RoundWork
from sparkdeep.protocol.wire import TOKEN_BYTES, Connection, ConnectionLostError
from sparkdeep.stages import coordinator as coordinator_module
from sparkdeep.stages import stage as stage_module
from sparkdeep.stages.arrivals import Arrivals
from sparkdeep.stages.collector import Plane
from sparkdeep.stages.ring import Ring
from sparkdeep.stages.stage import Stage
from sparkdeep.stages.star import Star
from sparkdeep.tensors.encoding import codec_named
from sparkdeep.tensors.mean import Partition
from sparkdeep.tensors.parameters import Layout, raw_bytes
from sparkdeep.tensors.state_dicts import pack, pack_tensors
from sparkdeep.versions import versions

TOKEN = bytes(range(TOKEN_BYTES))
SILENCE_S = 0.5
SPEC = RoundSpec(round=1, epoch=0, first_step=0, num_steps=1)


def net():
    """A small model with buffers."""
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


LAYOUT = Layout.of(net())
BUFFERS = dict(net().named_buffers())


def hello(replica=0, **changes):
    """A hello's header."""
    parts = {"run": "run", "stage": "stage", "replica": replica, "host": "h", "pid": 1, "device": "cpu"}
    parts |= {"versions": versions(), "rows": {"train": 4, "validation": 2}, "digest": "d", "shard": ""}
    return to_header(Hello(**{**parts, **changes}))


def update(buffers, **changes):
    """An update's header."""
    parts = {"round": 1, "rows": 4, "weight": 4.0, "steps": 1, "loss_sum": 1.0, "finite": True, "sections": []}
    parts |= {"buffer_bytes": len(buffers), "compute_s": 0.1, "input_s": 0.0, "logged": {"a": 0.5}}
    return to_header(Update(**{**parts, **changes}))


def frame_of(kind, header=None, body=b""):
    """One frame with the right token."""
    return frame(TOKEN, kind, header, body)


def replaced(script, kind, **changes):
    """A script with the header of one frame changed; a value of None takes the field away."""
    parts = []
    for header, body in frames_of(script):
        if header["kind"] == kind:
            header = {key: value for key, value in {**header, **changes}.items() if value is not None}
        parts.append(frame_of(header.pop("kind"), header, body))
    return b"".join(parts)


# -- frames -----------------------------------------------------------------------------------------------------------


def pair():
    """A bare socket, and a connection that hears it."""
    left, right = socket.socketpair(socket.AF_UNIX)
    return left, Connection(right, TOKEN)


def read_frames(data):
    """Frames until one of farewell, bodies included."""
    sock, connection = pair()
    with contextlib.closing(sock), contextlib.closing(connection):
        sock.setblocking(False)
        sent = sock.send(data)
        assert sent == len(data)
        sock.shutdown(socket.SHUT_WR)
        kind = ""
        while kind not in {"bye", "stop"}:
            got = connection.receive(timeout_s=SILENCE_S)
            connection.read_body(got.body_bytes, limit_bytes=1 << 36, timeout_s=SILENCE_S)
            kind = got.kind


# -- a driver before fake replicas ------------------------------------------------------------------------------------


def star_script(replica):
    """What a replica says in a whole stage."""
    vector, buffers = raw_bytes(torch.rand(LAYOUT.numel)).tobytes(), pack_tensors(BUFFERS)
    sums = {"weight": 2.0, "loss": 1.0}
    return b"".join(
        [
            frame_of("hello", hello(replica)),
            frame_of("opened", {"state": "fresh"}),
            frame_of("beat", {"rows": 1, "steps": 1}),
            frame_of("log", {"text": "a line"}),
            frame_of("update", update(buffers), with_checksum(vector + buffers)),
            frame_of("saved", {"bytes": 0, "seconds": 0.0}),
            frame_of("scores", {}, pack({"sums": sums, "states": {}, "seen": {}, "logged": {"a": [1.0, 2.0]}})),
            frame_of("state", {}, pack({"optimizer": torch.zeros(3)})),
            frame_of("bye"),
        ]
    )


def failing_script(replica):
    """A replica whose user's code raised; the stage ends with that."""
    failure = {"cause": "user", "message": "m", "traceback": "t", "where": "w"}
    return frame_of("hello", hello(replica)) + frame_of("opened", {"state": "fresh"}) + frame_of("error", failure)


def ring_script(replica, count):
    """What a replica says in a stage whose updates are added up among replicas."""
    part = raw_bytes(torch.rand(LAYOUT.numel)).tobytes()
    start, stop = Partition(LAYOUT.numel, count).bounds(replica)
    buffers = pack_tensors(BUFFERS)
    return b"".join(
        [
            frame_of("hello", hello(replica)),
            frame_of("opened", {"state": "fresh"}),
            frame_of("put", {"key": f"{replica}", "value": "address"}),
            frame_of("get", {"key": f"{(replica + 1) % count}"}),
            frame_of("formed"),
            frame_of("update", update(buffers), with_checksum(buffers)),
            frame_of("part", {}, with_checksum(part[4 * start : 4 * stop])),
            frame_of("saved", {"bytes": 0, "seconds": 0.0}),
            frame_of("bye"),
        ]
    )


def window_script(replica):
    """What a replica says in a stage with an asynchronous window of three steps."""
    vector, buffers = raw_bytes(torch.rand(LAYOUT.numel)).tobytes(), pack_tensors(BUFFERS)
    visit = {"round": 1, "steps": 1, "pushes": True, "fetches": True, "finite": True}
    return b"".join(
        [
            frame_of("hello", hello(replica)),
            frame_of("opened", {"state": "fresh"}),
            frame_of("visit", visit, with_checksum(vector)),
            frame_of("beat", {"rows": 1, "steps": 1}),
            frame_of("visit", {**visit, "steps": 2, "pushes": False}),
            frame_of("update", update(buffers, steps=3), with_checksum(vector + buffers)),
            frame_of("saved", {"bytes": 0, "seconds": 0.0}),
            frame_of("bye"),
        ]
    )


class Talkers:
    """Replicas that say what stands in their scripts, whatever they hear; a launcher's stage."""

    def __init__(self, address, scripts, *, silent):
        self._ended = []
        self._threads = [
            threading.Thread(target=self._talk, args=(address, script, silent and i == len(scripts) - 1), daemon=True)
            for i, script in enumerate(scripts)
        ]
        for thread in self._threads:
            thread.start()

    def _talk(self, address, script, silent):
        where = (address.host, address.port)
        # The driver may hang up at any word.
        with socket.create_connection(where, timeout=3.0) as sock, contextlib.suppress(OSError):
            sock.sendall(script)
            if not silent:
                sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass
        self._ended.append(ConnectionLostError("the replica's process ended"))

    def failure(self):
        """Why it fails, if it does."""
        return self._ended[0] if self._ended else None

    def finish(self, timeout_s):
        """Wait for all."""
        for thread in self._threads:
            thread.join(timeout=timeout_s)

    def cancel(self):
        """Nothing: they end when the driver hangs up."""


class Driver:
    """Opens a stage for each input, and goes through all its phases."""

    def __init__(self, *, ring=False, asynchronous=None):
        self._ring = ring
        self._asynchronous = asynchronous
        self._spec = SPEC if asynchronous is None else dataclasses.replace(SPEC, num_steps=3)
        self._coordinator = local_coordinator()
        self._coordinator.token = TOKEN
        stage_module._REASON_S = stage_module._LAST_WORDS_S = 0.2
        coordinator_module._HANDSHAKE_S = SILENCE_S

    def read(self, given):
        """One stage; its last replica is the mutated one."""
        scripts, count = given["scripts"], len(given["scripts"])
        start = Globals(parameters=LAYOUT.empty().zero_(), buffers=BUFFERS, sections=[], inner=torch.empty(0))
        collector = Star
        if self._asynchronous is not None:
            outer = SimpleNamespace(
                rule=self._asynchronous,
                recorded={},
                apply=lambda change, clock, steps: start.parameters.add_(change, alpha=1 / (1 + clock + steps)),
            )
            collector = partial(Arrivals, outer)
        averaging = Averaging(layout=LAYOUT, codec=codec_named("identity"), wide=not self._ring)
        plane = Plane(averaging=averaging, collector=collector)
        stage = Stage(
            run="run",
            name="stage",
            num_replicas=count,
            plane=plane,
            stall_timeout_s=SILENCE_S,
            on_beat=lambda _replica, rows: rows + 1,
            on_log=lambda _replica, text: text.encode("utf-8", "backslashreplace"),
        )
        self._coordinator.route(stage.admit)
        running = Talkers(self._coordinator.address, scripts, silent=given["silent"])
        try:
            stage.gather(running, timeout_s=2 * SILENCE_S, waiting_for=lambda: "")
            answer = Open(
                committed=0, scheduler_steps=0, state="fresh", kept_round=0, kept_by="", tensor_bytes=0, keep=False
            )
            stage.open([(answer, b"", b"")] * count, timeout_s=SILENCE_S)
            if self._ring:
                stage.collector = Ring
                stage.form_ring(timeout_s=SILENCE_S)
            work = RoundWork(
                specs=[self._spec] * count,
                clocks=[0] * count,
                rows=[2] * count,
                deadline_s=2 * SILENCE_S,
            )
            stage.train(work, start)
            if not self._ring and self._asynchronous is None:
                merge_scores(stage.evaluate(start), {})
                stage.states([0] * count)
            stage.close(save=None, clocks=[0] * count, timeout_s=SILENCE_S)
        finally:
            stage.abort()
            running.finish(2.0)

    def mutate(self, rng, given):
        """The last replica's script is changed; sometimes it then keeps the line, and is silent."""
        *others, last = given["scripts"]
        changed = mutate_frames(rng, last, TOKEN, start=rng.choice((0, 1, 1, 2)))
        return {"scripts": [*others, changed], "silent": rng.random() < 0.02}


class Port:
    """The coordinator's port, where strangers and zombies say hello."""

    def __init__(self):
        self._coordinator = local_coordinator()
        self._coordinator.token = TOKEN
        self._stage = "no stage"

    def read(self, data):
        """Say it by TCP, hang up, and wait until the port has hung up too."""
        admitted = []
        self._coordinator.route(lambda _hello, connection: (admitted.append(1), connection.close()))
        where = (self._coordinator.address.host, self._coordinator.address.port)
        # It may hang up before all is said.
        with socket.create_connection(where, timeout=3.0) as sock, contextlib.suppress(OSError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while answer := sock.recv(1 << 16):
                assert TOKEN in data or TOKEN not in answer, "a stranger was shown the token"
        assert admitted or data != frame_of("hello", hello()), "the port no longer admits a replica"


def targets(folder):
    """Those of this file."""
    torch.set_num_threads(1)
    port, star, ring = Port(), Driver(), Driver(ring=True)
    window = Driver(asynchronous=Asynchronous(1, 1, max_staleness=1))
    greeting = frame_of("hello", hello())
    star_one, ring_one, window_one = star_script(0), ring_script(0, 1), window_script(0)
    others = pack_tensors({name: torch.zeros(7) for name in BUFFERS})
    vector = raw_bytes(torch.rand(LAYOUT.numel)).tobytes()
    greeted = star_one[: star_one.index(PREFIX.pack(b"SPD1", TOKEN, 0, 0)[:36], 36)]
    stranger = frame(bytes(TOKEN_BYTES), "hello", hello())
    return [
        Target(
            name="wire-with-token",
            seeds=[star_script(0), ring_script(0, 2)],
            cases=[frame(TOKEN, "state", None, b"x", announced=1 << 36), frame(TOKEN, "x", announced=1 << 63)],
            mutate=partial(_with_token, limit=60_000),
            read=read_frames,
        ),
        Target(name="wire-without-token", seeds=[frame_of("bye")], mutate=_without_token, read=read_frames),
        Target(name="port", seeds=[greeting, stranger], mutate=_greeting, read=port.read, bound_mib=256),
        Target(
            name="stage-star",
            seeds=[*[_alone(star_script(0))] * 9, {"scripts": [star_script(0), star_script(1)], "silent": False}],
            cases=[
                {"scripts": [star_script(0), failing_script(1)], "silent": False},
                *map(
                    _alone,
                    [
                        replaced(star_one, "hello", rows={"train": 10**400}),
                        replaced(star_one, "update", weight=10**400),
                        replaced(star_one, "update", rows=0),
                        replaced(star_one, "beat", rows="x"),
                        replaced(star_one, "beat", rows=float("inf")),
                        replaced(star_one, "log", text=None),
                        replaced(star_one, "saved", seconds=-(10**400)),
                        greeted
                        + frame_of("opened", {"state": "fresh"})
                        + frame_of("update", update(others), with_checksum(vector + others)),
                        star_one.replace(b'["loss",', b'["lost",'),
                    ],
                ),
            ],
            mutate=star.mutate,
            read=star.read,
            bound_mib=256,
            share=4.0,
        ),
        Target(
            name="stage-ring",
            seeds=[
                *[_alone(ring_script(0, 1))] * 9,
                {"scripts": [ring_script(0, 2), ring_script(1, 2)], "silent": False},
            ],
            cases=[
                _alone(replaced(ring_one, "put", key="k" * 2000)),
                _alone(replaced(ring_one, "put", value=["v"])),
                _alone(replaced(ring_one, "get", key=None)),
            ],
            mutate=ring.mutate,
            read=ring.read,
            bound_mib=256,
            share=3.0,
        ),
        Target(
            name="stage-window",
            seeds=[*[_alone(window_one)] * 9, {"scripts": [window_script(0), window_script(1)], "silent": False}],
            cases=[
                *[_alone(replaced(window_one, "visit", steps=steps)) for steps in (0, -1, 3, 1 << 62, 10**400, 1.5)],
                *[_alone(replaced(window_one, "visit", **{name: None})) for name in ("round", "steps", "pushes")],
                _alone(replaced(window_one, "visit", finite=False)),
                _alone(replaced(window_one, "visit", pushes=False)),
                _alone(replaced(window_one, "visit", pushes=False, fetches=False)),
                _alone(replaced(window_one, "update", round=2)),
            ],
            mutate=window.mutate,
            read=window.read,
            bound_mib=256,
            share=2.0,
        ),
    ]


def _alone(script):
    """A stage of one replica, which waits for no other: ten inputs in the time of one."""
    return {"scripts": [script], "silent": False}


def _with_token(rng, data, limit):
    return mutate_frames(rng, data, TOKEN)[:limit]


def _without_token(rng, _):
    token = bytes(TOKEN_BYTES) if rng.random() < 0.5 else rng.randbytes(TOKEN_BYTES)
    if rng.random() < 0.5:
        return rng.randbytes(rng.randrange(300))
    return mutate_bytes(rng, frame(token, "hello", hello()))


def _greeting(rng, data):
    return mutate_frames(rng, data, data[4 : 4 + TOKEN_BYTES])
