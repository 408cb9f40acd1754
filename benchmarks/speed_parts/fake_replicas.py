"""Replicas that do no work, in processes of their own, on the real wire: rounds of a fit that only exchange."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, cast, final

import torch
from measuring.process_launcher import ProcessLauncher
from torch import Tensor, nn

from sparkdeep.models.program import Program
from sparkdeep.protocol.messages import Hello, RoundSpec, ShardFacts, Ticket, Update
from sparkdeep.replica.link import ReplicaLink
from sparkdeep.replica.stage import serve
from sparkdeep.replica.update import LocalResult, LocalUpdate
from sparkdeep.rounds.fit import Fit, new_run_id, plan_of
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.stages.coordinator import Coordinator
from sparkdeep.stages.opener import SocketStages
from sparkdeep.storage.disks import StateFiles
from sparkdeep.tensors.parameters import Layout
from sparkdeep.tensors.state_dicts import pack_tensors
from sparkdeep.tracking.records import RoundRecord
from sparkdeep.versions import versions

__all__ = ["FakeFit", "open_fake_fit"]

_ROWS: Final = {"train": 1_000_000, "validation": 0}
_DIGEST: Final = "none"
_BUFFERS: Final = pack_tensors({})
_OPEN_S: Final = 120.0
_FOREVER: Final = 1_000_000


class Flat(nn.Module):
    """A model of one float32 parameter.

    Args:
        numel: its length.
    """

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(numel))


@final
class _StandIn:
    """What `serve` needs of a Replica. It takes no steps: its update is what arrived, or where differences travel a noise."""

    def __init__(self, number: int, numel: int, local: LocalSettings) -> None:
        self.number = number
        self.device = torch.device("cpu")
        with torch.device("meta"):  # only its shape is needed
            self.layout = Layout.of(Flat(numel))
        self.exchange = LocalUpdate(self.layout, local, [])
        self._noise = torch.randn(numel).mul_(1e-3) if self.exchange.differs else None

    def load_tensors(self, data: bytes) -> None:
        """Nothing is fixed."""

    def begin_round(self, buffers: bytes | None) -> None:
        """There is no module to load."""

    def load_inner_state(self, sections: list[str], values: Tensor) -> None:
        """There is no optimizer."""

    def load_state(self, data: bytes) -> None:
        """There is none."""

    def restart(self, scheduler_steps: int) -> None:
        """Nothing has begun."""

    def catch_up(self, clock: int) -> None:
        """There is no schedule."""

    def save_state(self) -> bytes:
        """An empty one."""
        return b""

    def train(self, spec: RoundSpec) -> LocalResult:
        """The round without its steps."""
        update = Update(
            round=spec.round,
            rows=1,
            weight=1.0,
            steps=1,
            loss_sum=0.0,
            finite=True,
            sections=[],
            buffer_bytes=len(_BUFFERS),
            compute_s=0.0,
            input_s=0.0,
        )
        vector = self.exchange.known if self._noise is None else self._noise
        return LocalResult(update=update, vector=vector, buffers=_BUFFERS, exchange=self.exchange)


def _replica(
    number: int, connection: Connection, ticket: Ticket, numel: int, local: LocalSettings, states: str
) -> None:
    del connection
    channel = ReplicaLink.dial(ticket.address, ticket.token, connect_timeout_s=_OPEN_S, who=f"stand-in {number}")
    hello = Hello(
        run=ticket.run,
        stage=ticket.stage,
        replica=number,
        host=socket.gethostname(),
        pid=os.getpid(),
        device="cpu",
        versions=versions(),
        rows=_ROWS,
        digest=_DIGEST,
        shard="",
    )
    build = cast("Callable[[], Any]", lambda: _StandIn(number, numel, local))
    with contextlib.closing(channel):
        serve(channel, hello, build, StateFiles(Path(states) / str(number), ticket.stage))


@dataclass(kw_only=True)
class FakeFit:
    """A fit with an open stage, whose rounds are exchanges and nothing else."""

    rounds: Iterator[RoundRecord]
    record: RoundRecord
    """Of the last round."""

    def round(self) -> float:
        """Seconds of one round: parameters down, updates up, the mean taken and written to the global parameters."""
        began = time.perf_counter()
        self.record = next(self.rounds)
        return time.perf_counter() - began


@contextlib.contextmanager
def open_fake_fit(
    replicas: int,
    numel: int,
    *,
    local: LocalSettings | None = None,
    aggregation: Any = "star",
    host: str = "127.0.0.1",
    inside: Sequence[str] | None = None,
) -> Iterator[FakeFit]:
    """Open a stage of stand-ins, and warm up with one round.

    Args:
        replicas: how many.
        numel: float32 parameters.
        local: how updates travel; one row a batch.
        aggregation: "star" or "ring".
        host: where the coordinator listens, and the stand-ins dial.
        inside: the network namespace of each.
    """
    local = local or LocalSettings(batch_size=1)
    coordinator = Coordinator(bind_host=host, advertised_host=host, ports=range(1))
    with tempfile.TemporaryDirectory(prefix="sparkdeep-fake-") as states, contextlib.closing(coordinator):
        program = Program(model=Flat(numel), loss=nn.MSELoss(), optimizer=torch.optim.SGD)
        fit = Fit(
            program=program,
            local=local,
            settings=RunSettings(
                num_workers=replicas,
                sync_every=1,
                rounds_per_stage=_FOREVER,
                max_stage_s=_FOREVER,
                max_retries=0,
                aggregation=aggregation,
            ),
            plan=plan_of(program, local, None),
            shards=[ShardFacts(rows=_ROWS, digest=_DIGEST)] * replicas,
            stages=SocketStages(
                launcher=ProcessLauncher(_replica, replicas, numel, local, states, inside=inside),
                coordinator=coordinator,
            ),
            run=new_run_id(),
        )
        with contextlib.closing(fit.rounds()) as rounds:
            yield FakeFit(rounds=rounds, record=next(rounds))
