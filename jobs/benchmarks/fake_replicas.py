"""Replicas that do no work, in processes of their own, on the real wire: they send back the vector that they get."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, cast, final

import torch
from torch import Tensor

from benchmarks.process_launcher import ProcessLauncher
from benchmarks.traffic import wire_bytes
from sparkdeep.channel import Channel
from sparkdeep.coordinator import Coordinator
from sparkdeep.launch import Ticket
from sparkdeep.messages import Hello, Open, Update
from sparkdeep.outer import Assign
from sparkdeep.parameters import Entry, Layout, raw_bytes
from sparkdeep.replica import LocalResult
from sparkdeep.schedule import RoundSpec
from sparkdeep.session import serve, versions
from sparkdeep.stage import Globals, Stage
from sparkdeep.state_files import StateFiles
from sparkdeep.trees import pack_tensors

__all__ = ["ROWS", "FakeStage", "fake_launcher", "flat_layout", "open_fake_stage"]

ROWS: Final = {"train": 1_000_000, "validation": 0}
"""What every stand-in says of its shard, whose digest is "fake"."""
NO_BUFFERS: Final = pack_tensors({})
_OPEN_S: Final = 120.0
_STALL_S: Final = 120.0


def flat_layout(numel: int) -> Layout:
    """A model of one float32 parameter, shape (numel,)."""
    entry = Entry(name="weight", shape=(numel,), dtype=torch.float32, offset=0)
    return Layout(entries=(entry,), dtype=torch.float32, buffers=(), variance_of={})


@final
class StandIn:
    """What `serve` needs of a Replica; it takes no steps, and its update is the vector that arrived."""

    def __init__(self, numel: int) -> None:
        self.layout = flat_layout(numel)
        self.flat = self.layout.empty()

    def load_tensors(self, data: bytes) -> None:
        """There is no module."""

    def load_parameters(self, buffers: bytes) -> None:
        """They lie in `flat` already."""

    def load_inner_state(self, sections: list[str], values: Tensor) -> None:
        """There is no optimizer."""

    def load_state(self, data: bytes) -> None:
        """There is none."""

    def restart(self, scheduler_steps: int) -> None:
        """Nothing has begun."""

    def save_state(self) -> bytes:
        """An empty one."""
        return b""

    def train(self, spec: RoundSpec) -> LocalResult:
        """The round without its steps: what a replica does to its vector before it goes out."""
        update = Update(
            round=spec.round,
            rows=1,
            weight=1.0,
            steps=1,
            loss_sum=0.0,
            finite=bool(torch.isfinite(self.flat.sum())),
            sections=[],
            buffer_bytes=len(NO_BUFFERS),
            crc32=zlib.crc32(NO_BUFFERS, zlib.crc32(raw_bytes(self.flat))),
            compute_s=0.0,
            input_s=0.0,
        )
        return LocalResult(update=update, vector=self.flat, buffers=NO_BUFFERS)


def _replica(number: int, connection: Connection, ticket: Ticket, numel: int, states: str) -> None:
    del connection
    channel = Channel.dial(ticket.address, ticket.token, connect_timeout_s=_OPEN_S, who=f"stand-in {number}")
    hello = Hello(
        run=ticket.run,
        stage=ticket.stage,
        replica=number,
        host=socket.gethostname(),
        pid=os.getpid(),
        device="cpu",
        versions=versions(),
        rows=ROWS,
        digest="fake",
        shard="",
    )
    build = cast("Callable[[], Any]", lambda: StandIn(numel))
    with contextlib.closing(channel):
        serve(channel, hello, build, StateFiles(Path(states) / str(number)))


def fake_launcher(replicas: int, numel: int, states: str, *, inside: Sequence[str] | None = None) -> ProcessLauncher:
    """Starts stand-ins of `numel` parameters, each in its network namespace if `inside` names them."""
    return ProcessLauncher(_replica, replicas, numel, states, inside=inside)


@dataclass(kw_only=True)
class FakeStage:
    """An open stage, and the driver's part of its rounds."""

    stage: Stage
    coordinator: Coordinator
    parameters: Tensor
    """(numel,) float32: what `Assign` writes to."""
    rounds: int = 0

    def round(self) -> float:
        """Seconds of one round: parameters down, updates up, the mean taken and written."""
        self.rounds += 1
        spec = RoundSpec(round=self.rounds, epoch=0, first_step=0, num_steps=0)
        start = Globals(parameters=self.parameters, buffers={}, sections=[], inner=self.parameters[:0])
        began = time.perf_counter()
        Assign().step(self.parameters, lambda: self.stage.train(spec, start))
        return time.perf_counter() - began

    def wire_bytes(self) -> int:
        """Bytes that passed the driver's port so far, both ways."""
        return wire_bytes(self.coordinator.address.port)


@contextlib.contextmanager
def open_fake_stage(
    replicas: int, numel: int, *, host: str = "127.0.0.1", inside: Sequence[str] | None = None
) -> Iterator[FakeStage]:
    """Open a stage of stand-ins (in these network namespaces) that dial `host`, after one round that warms up."""
    coordinator = Coordinator(bind_host=host, advertised_host=host, ports=range(1))
    stage = Stage(
        run="benchmark",
        name="fake",
        num_replicas=replicas,
        layout=flat_layout(numel),
        stall_timeout_s=_STALL_S,
        on_beat=lambda _replica, _rows: None,
        on_log=lambda _replica, _line: None,
    )
    coordinator.route(stage.admit)
    with tempfile.TemporaryDirectory(prefix="sparkdeep-fake-") as states:
        try:
            ticket = Ticket(address=coordinator.address, token=coordinator.token, run="benchmark", stage="fake")
            running = fake_launcher(replicas, numel, states, inside=inside).launch(ticket, "")
            stage.gather(running, timeout_s=_OPEN_S, waiting_for=str)
            answer = Open(committed=0, scheduler_steps=0, state="fresh", tensor_bytes=0, keep=False)
            stage.open([(answer, b"", b"")] * replicas, timeout_s=_OPEN_S)
            opened = FakeStage(stage=stage, coordinator=coordinator, parameters=torch.ones(numel))
            opened.round()
            yield opened
            stage.close(save=None)
        finally:
            stage.abort()
            coordinator.close()
