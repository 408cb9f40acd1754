"""Who starts replicas: the protocol, and its in-process twin that runs them as threads."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final

import torch

from sparkdeep.channel import Address, Channel
from sparkdeep.config import LocalSettings
from sparkdeep.data.schema import Schema
from sparkdeep.data.shards import Shard
from sparkdeep.errors import ReplicaLostError
from sparkdeep.generation import ShardFacts
from sparkdeep.messages import Hello
from sparkdeep.program import unpack_program
from sparkdeep.replica import Replica
from sparkdeep.session import serve, versions
from sparkdeep.state_files import StateFiles

__all__ = ["InProcessLauncher", "Launcher", "ReplicaPlan", "RunningStage", "Ticket"]


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What a replica needs to join one opening of the stage."""

    address: Address
    token: bytes
    run: str
    stage: str
    """Unique to this opening; what names a zombie."""
    connect_timeout_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class ReplicaPlan:
    """What every replica of a run is made from; the same for all stages."""

    program: bytes
    """`program.pack_program`."""
    settings: LocalSettings
    schema: Schema


class RunningStage(Protocol):
    """Replicas on their way to the coordinator, or at work."""

    def failure(self) -> BaseException | None:
        """Why the stage failed, as far as its launcher knows; None while it runs or after it ended well."""

    def finish(self, timeout_s: float) -> None:
        """Wait for the replicas to end after they were told to stop; cancels what is left."""

    def cancel(self) -> None:
        """End the replicas now; returns at once."""


class Launcher(Protocol):
    """Starts one replica per shard."""

    @property
    def num_replicas(self) -> int:
        """How many."""

    def launch(self, ticket: Ticket, description: str) -> RunningStage:
        """Start all replicas; each dials the ticket's address and says hello."""

    def renew(self) -> None:
        """Make the shards anew before the next launch: a replica did not find its own."""

    def slots(self) -> int | None:
        """How many replicas could run at the same time, whether their slots are busy or not; None where nobody knows."""

    def resize(self, num_replicas: int) -> Sequence[ShardFacts]:
        """Deal the rows anew, to so many replicas; what their shards hold.

        Raises:
            ReplicaLostError: it could not be done now, but perhaps later.
        """


def open_replica(plan: ReplicaPlan, channel: Channel, shard: Shard, *, number: int, device: torch.device) -> Replica:
    """Build a replica from the plan; the user's model is made here."""
    program = unpack_program(plan.program)
    return Replica(program, plan.settings, plan.schema, shard, number=number, device=device, beat=channel.beat)


@final
class InProcessLauncher:
    """Replicas as threads of this process, on shards that lie in local folders.

    They take turns on the global random generators, so results are those of separate processes.

    Args:
        plan: of the run.
        shards: one folder a replica.
        state_dir: where replica states are kept between stages.
        deal: makes shards for another number of replicas, and gives their folders; None: their number is fixed.
    """

    def __init__(
        self,
        plan: ReplicaPlan,
        shards: Sequence[Path],
        state_dir: Path,
        deal: Callable[[int], Sequence[Path]] | None = None,
    ) -> None:
        self.num_replicas = len(shards)
        self._deal = deal
        self._plan = plan
        self._shards = list(shards)
        self._state_dir = state_dir

    def launch(self, ticket: Ticket, description: str) -> RunningStage:
        """Start one thread a replica."""
        del description
        return _Threads(
            [(i, self._plan, path, self._state_dir / f"{i}") for i, path in enumerate(self._shards)], ticket
        )

    def renew(self) -> None:
        """Nothing: the folders are the caller's."""

    def slots(self) -> int | None:
        """Not known: threads need none."""
        return None

    def resize(self, num_replicas: int) -> Sequence[ShardFacts]:
        """Have the caller deal."""
        assert self._deal is not None, "these shards were dealt once and for all"
        self._shards = list(self._deal(num_replicas))
        self.num_replicas = len(self._shards)
        facts = []
        for path in self._shards:
            with contextlib.closing(Shard.open(path)) as shard:
                facts.append(ShardFacts(rows=shard.info.rows, digest=shard.info.digest))
        return facts


class _Threads:
    """A stage of threads."""

    def __init__(self, work: list[tuple[int, ReplicaPlan, Path, Path]], ticket: Ticket) -> None:
        self._failure: BaseException | None = None
        self._channels: dict[int, Channel] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(*item, ticket), name=f"sparkdeep-replica-{item[0]}", daemon=True)
            for item in work
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int, plan: ReplicaPlan, path: Path, state_dir: Path, ticket: Ticket) -> None:
        try:
            channel = Channel.dial(
                ticket.address, ticket.token, connect_timeout_s=ticket.connect_timeout_s, who=f"replica {number}"
            )
            self._channels[number] = channel
            with contextlib.closing(channel), contextlib.closing(Shard.open(path)) as shard:
                self._serve(channel, shard, number, plan, state_dir, ticket)
        except Exception as error:  # noqa: BLE001 (it is handed to the driver's thread by `failure`)
            # The first is the cause; the others lost their line because of it.
            self._failure = self._failure or error

    def _serve(
        self, channel: Channel, shard: Shard, number: int, plan: ReplicaPlan, state_dir: Path, ticket: Ticket
    ) -> None:
        device = torch.device("cpu" if plan.settings.device == "auto" else plan.settings.device)
        hello = Hello(
            run=ticket.run,
            stage=ticket.stage,
            replica=number,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=str(device),
            versions=versions(),
            rows=shard.info.rows,
            digest=shard.info.digest,
            shard="",
        )
        serve(
            channel,
            hello,
            lambda: open_replica(plan, channel, shard, number=number, device=device),
            StateFiles(state_dir),
        )

    def failure(self) -> BaseException | None:
        """The first exception of a thread."""
        return self._failure

    def finish(self, timeout_s: float) -> None:
        """Join the threads."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            self.cancel()
            raise ReplicaLostError(f"replica threads did not end within {timeout_s:g} s after they were told to stop.")

    def cancel(self) -> None:
        """Hang up on the replicas; they end at their next word to the driver."""
        for channel in list(self._channels.values()):
            channel.close()
