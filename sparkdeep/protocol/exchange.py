"""Updates through shared storage: every replica lays down its own, the first one averages them all.

A job's files lie in a folder of the job's own, `sparkdeep-<run>/<job>/`: what a zombie of an earlier attempt writes is
never looked at. A body is written before its header, and a header is whole or absent: who reads the header can read
the body.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, final

from sparkdeep.errors import ProtocolError, ReplicaLostError
from sparkdeep.protocol.messages import Update, field, parse, to_header
from sparkdeep.protocol.orders import Stored, digest_of
from sparkdeep.storage.disks import own_files
from sparkdeep.storage.opening import open_store
from sparkdeep.storage.store import Bytes, run_folder

__all__ = ["Exchange", "job_folder"]

_FIRST_POLL_S: Final = 0.01
_LAST_POLL_S: Final = 0.25
_HEADER_LIMIT_BYTES: Final = 1 << 20


def job_folder(run: str, job: str) -> str:
    """A job's folder in the exchange directory."""
    return f"{run_folder(run)}/{job}"


@final
class Exchange:
    """One job's part of the exchange directory, as replicas see it.

    Args:
        uri: the exchange directory: a path, or a URI that pyarrow opens.
        run: the run's id.
        job: the job's.

    Raises (all methods):
        ReplicaLostError: the storage failed, or what lies there is damaged; the round can be repeated.
        ProtocolError: a header is none.
    """

    def __init__(self, uri: str, run: str, job: str) -> None:
        self._uri = uri
        self._store = open_store(uri)
        self._folder = job_folder(run, job)
        self._run = run

    def put(self, replica: int, host: str, update: Update, body: Bytes) -> None:
        """Lay down a replica's update."""
        with own_files("it wrote its update to exchange_dir"):
            if update.weight > 0:
                self._store.write(self._name(replica, "body"), body)
            header = {"host": host, "update": to_header(update)}
            self._store.write(self._name(replica, "header"), json.dumps(header).encode())

    def headers(self, count: int, *, timeout_s: float, check: Callable[[], None]) -> tuple[list[Update], list[str]]:
        """Wait for every replica's header; gives them and the hosts, in replica order.

        Args:
            count: replicas.
            timeout_s: for all of them together.
            check: called between looks; raises to give up.
        """
        deadline = time.monotonic() + timeout_s
        updates, hosts = [], []
        for replica in range(count):
            data = self._await(replica, deadline, timeout_s, check)
            try:
                header = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise ReplicaLostError(
                    f"the header of replica {replica} in exchange_dir={self._store.uri} is damaged: {error}",
                    replica=replica,
                ) from error
            if not isinstance(header, dict):
                raise ProtocolError(f"the header of replica {replica} in exchange_dir is a {type(header).__name__}.")
            updates.append(parse(Update, field(header, "update", dict[str, Any])))
            hosts.append(field(header, "host", str))
        return updates, hosts

    def body(self, replica: int, num_bytes: int) -> bytes:
        """A replica's body, whose header was read already."""
        with own_files(f"it read the update of replica {replica} from exchange_dir"):
            return self._store.read(self._name(replica, "body"), max_bytes=num_bytes)

    def put_mean(self, data: bytes) -> Stored:
        """Lay down what the next round starts from."""
        name = f"{self._folder}/mean"
        with own_files("it wrote the mean to exchange_dir"):
            self._store.write(name, data)
        return Stored(folder=self._uri, names=(name,), num_bytes=len(data), digest=digest_of(data))

    def sweep(self, jobs: Sequence[str]) -> None:
        """Remove the folders of earlier jobs; what cannot be removed now goes with the run's folder."""
        for job in jobs:
            with contextlib.suppress(OSError):
                self._store.delete(job_folder(self._run, job))

    def _await(self, replica: int, deadline: float, timeout_s: float, check: Callable[[], None]) -> bytes:
        pause_s = _FIRST_POLL_S
        while True:
            with own_files(f"it looked for the update of replica {replica} in exchange_dir"):
                try:
                    return self._store.read(self._name(replica, "header"), max_bytes=_HEADER_LIMIT_BYTES)
                except FileNotFoundError:
                    pass
            check()
            if time.monotonic() > deadline:
                raise ReplicaLostError(
                    f"the update of replica {replica} did not appear in exchange_dir={self._store.uri} within "
                    f"{timeout_s:g} s: every executor must see the same storage there.",
                    replica=replica,
                )
            time.sleep(pause_s)
            pause_s = min(_LAST_POLL_S, 1.5 * pause_s)

    def _name(self, replica: int, part: str) -> str:
        return f"{self._folder}/update-{replica:05d}-{part}"
