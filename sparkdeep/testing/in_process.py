"""Replicas as threads of this process: the twins of a stage's launcher and of the runner of a job a round."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

from sparkdeep.data.shards import Shard
from sparkdeep.errors import ReplicaLostError
from sparkdeep.protocol.messages import ReplicaPlan, ShardFacts, Ticket
from sparkdeep.protocol.orders import Inline, Job, Parcel, Reply, Stored, digest_of
from sparkdeep.replica.job import Letter, obey
from sparkdeep.replica.link import ReplicaLink
from sparkdeep.replica.stage import Place, live
from sparkdeep.settings.run import LocalSettings
from sparkdeep.stages.staffing import RunningStage
from sparkdeep.storage.opening import open_store
from sparkdeep.storage.store import run_folder

__all__ = ["InProcessLauncher", "InProcessRunner"]


@final
class InProcessLauncher:
    """Replicas as threads of this process, on shards that lie in local folders.

    They take turns on the global random generators, so results are those of separate processes.

    Args:
        plan: the replicas' plan of the run.
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
        places = [_place(i, self._plan.settings, path, self._state_dir) for i, path in enumerate(self._shards)]
        return _Threads(self._plan, places, ticket)

    def renew(self) -> None:
        """Nothing: the folders are the caller's."""

    def slots(self) -> int | None:
        """Not known: threads need no slots."""
        return None

    def resize(self, num_replicas: int) -> Sequence[ShardFacts]:
        """Have the caller deal the rows."""
        assert self._deal is not None, "these shards were dealt once and for all"
        self._shards = list(self._deal(num_replicas))
        self.num_replicas = len(self._shards)
        facts = []
        for path in self._shards:
            with contextlib.closing(Shard.open(path)) as shard:
                facts.append(ShardFacts(rows=shard.info.rows, digest=shard.info.digest))
        return facts


class _Threads:
    """A stage whose replicas are threads."""

    def __init__(self, plan: ReplicaPlan, places: Sequence[Place], ticket: Ticket) -> None:
        self._failure: BaseException | None = None
        self._links: dict[int, ReplicaLink] = {}
        self._threads = [
            threading.Thread(
                target=self._run, args=(plan, place, ticket), name=f"sparkdeep-replica-{place.replica}", daemon=True
            )
            for place in places
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, plan: ReplicaPlan, place: Place, ticket: Ticket) -> None:
        try:
            link = ReplicaLink.dial(
                ticket.address, ticket.token, connect_timeout_s=ticket.connect_timeout_s, who=f"replica {place.replica}"
            )
            self._links[place.replica] = link
            with contextlib.closing(link):
                live(link, place, run=ticket.run, stage=ticket.stage, plan=lambda: plan)
        except Exception as error:  # noqa: BLE001 (it is handed to the driver's thread by `failure`)
            # The first is the cause; the others lost their connections because of it.
            self._failure = self._failure or error

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
        """Close the replicas' connections; each ends when it next talks to the driver."""
        for link in list(self._links.values()):
            link.close()


def _place(replica: int, settings: LocalSettings, shard: Path, state_dir: Path) -> Place:
    return Place(
        replica=replica,
        host=socket.gethostname(),
        device="cpu" if settings.device == "auto" else settings.device,
        shard=shard,
        state_dir=state_dir / f"{replica}",
    )


@final
class InProcessRunner:
    """Runs jobs in threads of this process.

    Args:
        settings: of the local work; only the device is read.
        shards: one folder a replica.
        state_dir: where replica states are kept between jobs.
        run: the run's id.
        exchange: a folder through which updates and parameters go, or None.
        keeps_states: whether replicas keep their states.
    """

    def __init__(
        self,
        settings: LocalSettings,
        shards: Sequence[Path],
        state_dir: Path,
        *,
        run: str,
        exchange: str | None = None,
        keeps_states: bool = True,
    ) -> None:
        self.num_replicas = len(shards)
        self.keeps_states = keeps_states
        self.exchange = exchange
        self._settings = settings
        self._shards = list(shards)
        self._state_dir = state_dir
        self._run = run
        self.shipped: list[str] = []
        """Slots, in the order in which something new was shipped in them."""
        self._slots: dict[str, Parcel] = {}

    def ship(self, slot: str, data: bytes) -> Parcel:
        """Send it as part of the order, or as a file of the exchange folder."""
        digest = digest_of(data)
        held = self._slots.get(slot)
        if held is not None and held.digest == digest:
            return held
        self.shipped.append(slot)
        if self.exchange is None:
            self._slots[slot] = Inline(data=data, digest=digest)
        else:
            name = f"{run_folder(self._run)}/{slot}-{secrets.token_hex(4)}"
            open_store(self.exchange).write(name, data)
            self._slots[slot] = Stored(folder=self.exchange, names=(name,), num_bytes=len(data), digest=digest)
        return self._slots[slot]

    def run(self, job: Job, description: str, *, timeout_s: float, idle_timeout_s: float) -> list[Reply]:
        """One thread a replica; the first failure is raised once all have ended."""
        del description, idle_timeout_s
        failures: list[Exception] = []
        replies: list[Reply] = []

        def check() -> None:
            if failures:
                raise ReplicaLostError("another replica failed.")

        def work(replica: int) -> None:
            try:
                place = _place(replica, self._settings, self._shards[replica], self._state_dir)
                reply = obey(job, place, Letter(job), check=check)
                # The bodies are views of the replica's memory, which goes away with the replica.
                replies.append(Reply(header=reply.header, bodies=tuple(bytes(body) for body in reply.bodies)))
            except Exception as error:  # noqa: BLE001 (it is raised in the caller's thread)
                failures.append(error)

        threads = [
            threading.Thread(target=work, args=(i,), name=f"sparkdeep-replica-{i}", daemon=True)
            for i in range(self.num_replicas)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        if failures:
            raise failures[0]
        if any(thread.is_alive() for thread in threads):
            raise ReplicaLostError(f"the job did not end within {timeout_s:g} s.")
        return replies

    def renew(self) -> None:
        """Nothing: the folders are the caller's."""
