"""The in-process twin of a Spark job a round: replicas as threads on shards in local folders."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import final

from sparkdeep.config import LocalSettings
from sparkdeep.errors import ReplicaLostError
from sparkdeep.exchange import run_folder
from sparkdeep.orders import Inline, Order, Parcel, Reply, Stored, digest_of
from sparkdeep.round_replica import Place, obey
from sparkdeep.store import open_store

__all__ = ["InProcessRunner"]


@final
class InProcessRunner:
    """Runs orders in threads of this process.

    Args:
        settings: of the local work; only the device is read.
        shards: one folder a replica.
        state_dir: where replica states are kept between jobs.
        run: the run's id.
        exchange: a folder through which updates and parameters go, or None.
    """

    def __init__(
        self,
        settings: LocalSettings,
        shards: Sequence[Path],
        state_dir: Path,
        *,
        run: str,
        exchange: str | None = None,
    ) -> None:
        self.num_replicas = len(shards)
        self.exchange = exchange
        self._device = "cpu" if settings.device == "auto" else settings.device
        self._shards = list(shards)
        self._state_dir = state_dir
        self._run = run
        self.shipped: list[str] = []
        """Slots, in the order in which something new was shipped in them."""
        self._slots: dict[str, Parcel] = {}

    def ship(self, slot: str, data: bytes) -> Parcel:
        """As part of the order, or as a file of the exchange."""
        digest = digest_of(data)
        held = self._slots.get(slot)
        if held is not None and held.digest == digest:
            return held
        self.shipped.append(slot)
        parcel: Parcel = Inline(data=data, digest=digest)
        if self.exchange is not None:
            name = f"{run_folder(self._run)}/{slot}-{secrets.token_hex(4)}"
            open_store(self.exchange).write(name, data)
            parcel = Stored(folder=self.exchange, names=(name,), num_bytes=len(data), digest=digest)
        self._slots[slot] = parcel
        return parcel

    def run(self, order: Order, description: str, *, timeout_s: float, idle_timeout_s: float) -> list[Reply]:
        """One thread a replica; the first failure is raised once all have ended."""
        del description, idle_timeout_s
        failures: list[Exception] = []
        replies: list[Reply] = []

        def check() -> None:
            if failures:
                raise ReplicaLostError("another replica failed.")

        def work(replica: int) -> None:
            place = Place(
                replica=replica,
                host=socket.gethostname(),
                device=self._device,
                shard=self._shards[replica],
                problem="",
                state_dir=self._state_dir / f"{replica}",
                beat=lambda: None,
                check=check,
            )
            try:
                reply = obey(order, place)
                # The bodies are views of the replica's memory, which ends with it.
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
