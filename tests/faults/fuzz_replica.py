"""The target on the replica's side: a replica that serves whatever a driver says."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from functools import partial
from types import SimpleNamespace

import torch
from fuzz_lines import BUFFERS, LAYOUT, SILENCE_S, SPEC, TOKEN, frame_of, hello, net, replaced
from fuzzing import Target
from mutating import mutate_frames
from torch import nn
from torch.optim import SGD
from twin import schema_of, write_shards

from sparkdeep.data.shards import Shard
from sparkdeep.models.program import Program
from sparkdeep.optim.asynchronous import Asynchronous
from sparkdeep.optim.averaging import Averaging
from sparkdeep.protocol.messages import Hello, to_header
from sparkdeep.protocol.orders import Globals, Order, RoundWork
from sparkdeep.protocol.wire import Connection
from sparkdeep.replica import link as link_module
from sparkdeep.replica.link import ReplicaLink
from sparkdeep.replica.replica import Replica
from sparkdeep.replica.stage import serve
from sparkdeep.settings.run import LocalSettings
from sparkdeep.stages.admission import Terms
from sparkdeep.stages.arrivals import Arrivals
from sparkdeep.stages.collector import Plane, Round
from sparkdeep.stages.gathering import Gathering
from sparkdeep.stages.star import Star
from sparkdeep.storage.disks import StateFiles
from sparkdeep.tensors.encoding import codec_named
from sparkdeep.tensors.parameters import raw_bytes
from sparkdeep.tensors.state_dicts import pack_tensors


class ReplicaEnd:
    """A replica that serves whatever a driver says."""

    def __init__(self, folder):
        parts = {"features": torch.rand(4, 2).numpy(), "label": torch.rand(4, 1).numpy()}
        self._schema = schema_of(parts["features"], parts["label"])
        rows = {name: values[:2] for name, values in parts.items()}
        (path,) = write_shards(folder / "replica", [parts], self._schema, [rows])
        self._shard = Shard.open(path)
        self._states = StateFiles(folder / "states", "stage")
        self._settings = LocalSettings(batch_size=2)
        self.state = self._build(None).save_state()
        link_module.DRIVER_SILENCE_S = SILENCE_S

    def _build(self, channel):
        program = Program(model=net(), loss=nn.MSELoss(), optimizer=partial(SGD, lr=0.1, momentum=0.9))
        beat = channel.beat if channel else lambda _rows, _steps: None
        return Replica(
            program, self._settings, self._schema, self._shard, number=0, device=torch.device("cpu"), beat=beat
        )

    def seeds(self):
        """What a driver says in a whole stage: fresh and with one round's order, or restored and with all else."""
        plane = Plane(averaging=Averaging(layout=LAYOUT, codec=codec_named("identity"), wide=False), collector=Star)
        start = Globals(parameters=LAYOUT.empty().zero_(), buffers=BUFFERS, sections=[], inner=torch.empty(0))
        given = Round(
            plane=plane,
            work=RoundWork(specs=[SPEC], clocks=[0], rows=[2]),
            start=start,
            ahead=None,
            fresh=True,
            held=False,
            num_replicas=1,
            check=lambda: None,
        )
        buffers = pack_tensors(BUFFERS)
        train = _order(given, Star)
        terms = Terms(quorum=1)
        undoable = _order(dataclasses.replace(given, plane=dataclasses.replace(plane, terms=terms)), Star)
        outer = SimpleNamespace(rule=Asynchronous(1, 2), recorded={}, apply=lambda _change, _clock, _steps: None)
        longer = dataclasses.replace(given.work, specs=[dataclasses.replace(SPEC, num_steps=2)])
        window = _order(dataclasses.replace(given, work=longer), partial(Arrivals, outer))
        fetched = frame_of("fetched", None, raw_bytes(start.parameters).tobytes())
        tensors = pack_tensors(dict(net().named_parameters()))
        answer = {"committed": 0, "scheduler_steps": 0, "state": "fresh", "tensor_bytes": 0, "keep": True}
        answer |= {"kept_round": 0, "kept_by": ""}
        evaluate = to_header(Order(buffer_bytes=len(buffers)))
        return [
            frame_of("open", answer) + train + frame_of("alive") + frame_of("stop", {"save": 1, "clock": 1}),
            b"".join(
                [
                    frame_of(
                        "open",
                        {**answer, "state": "sent", "tensor_bytes": len(tensors), "committed": 1},
                        tensors + self.state,
                    ),
                    frame_of("probe", None, b"load"),
                    frame_of("evaluate", evaluate, raw_bytes(start.parameters).tobytes() + buffers),
                    frame_of("state", to_header(Order())),
                    undoable,
                    frame_of("undo", {"round": SPEC.round}),
                    train,
                    frame_of("stop", {"save": None}),
                ]
            ),
            frame_of("open", answer) + window + frame_of("alive") + fetched + frame_of("stop", {"save": None}),
        ]

    def read(self, script):
        """Serve a driver that says `script`; what the replica answers is read and dropped."""
        left, right = socket.socketpair(socket.AF_UNIX)
        talker = threading.Thread(target=_talk, args=(left, script), daemon=True)
        channel = ReplicaLink(Connection(right, TOKEN), "127.0.0.1")
        talker.start()
        try:
            serve(channel, Hello(**hello()), lambda: self._build(channel), self._states)
        finally:
            channel.close()
            talker.join(timeout=3.0)

    def load(self, data):
        """A state as it lies on an executor's disk."""
        self._build(None).load_state(data)


def _order(given, collector):
    header, bodies = Gathering(given, collector(given)).order(0)
    return frame_of("train", header, b"".join(bodies))


def _talk(sock, script):
    with contextlib.closing(sock), contextlib.suppress(OSError):
        sock.sendall(script)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(1 << 16):
            pass


def targets(folder):
    """Those of this file."""
    torch.set_num_threads(1)
    replica = ReplicaEnd(folder)
    fresh, restored, window = replica.seeds()
    return [
        Target(
            name="replica",
            seeds=[fresh, restored, window],
            cases=[
                *[replaced(fresh, "train", **{name: None}) for name in ("spec", "parameters", "previous", "clock")],
                replaced(fresh, "train", spec={"round": 1, "epoch": 0, "first_step": 0}),
                replaced(fresh, "train", spec={"round": 1, "epoch": "x", "first_step": 0, "num_steps": 1}),
                replaced(fresh, "train", ahead=7),
                window.replace(b'"n_fetch": 1', b'"n_fetch": 0'),
                window.replace(b'"n_push": 2', b'"n_push":-2'),
                window.replace(b"fetched", b"scored!"),
                replaced(fresh, "train", sections=3),
                *[replaced(fresh, "train", parameters=what) for what in ("part", "held", "change", "x")],
                replaced(fresh, "stop", save="x"),
                fresh.replace(b"running_var", b"runnin'_var"),
                replaced(restored, "open", tensor_bytes=1 << 33),
                replaced(restored, "open", tensor_bytes=-1),
                replaced(restored, "evaluate", buffer_bytes=None),
            ],
            mutate=partial(mutate_frames, token=TOKEN),
            read=replica.read,
            bound_mib=256,
            share=3.0,
        ),
    ]
