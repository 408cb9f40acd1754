"""How bytes reach replicas through Spark: in the task's closure, as a broadcast, as an artifact, or through storage."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from sparkdeep.errors import PreflightError, ReplicaLostError
from sparkdeep.protocol.orders import Inline, Parcel, Stored, checked, digest_of
from sparkdeep.spark.session.access import access_to, is_connect
from sparkdeep.spark.session.failures import named_failures
from sparkdeep.storage.disks import own_files
from sparkdeep.storage.opening import open_store
from sparkdeep.storage.store import run_folder

__all__ = ["ARTIFACT_LIMIT_BYTES", "CLOSURE_LIMIT_BYTES", "Carrier", "artifact_bytes", "carried", "carrier_for"]

CLOSURE_LIMIT_BYTES: Final = 4 << 20
"""On Spark Connect: a closure is part of the plan, which the server holds in its heap."""
BROADCAST_FROM_BYTES: Final = 1 << 20
"""On a classic session: where PySpark itself begins to broadcast closures."""
ARTIFACT_LIMIT_BYTES: Final = 64 << 20
"""Per session, in total: artifacts stay on the server until the session ends."""
_PIECE_BYTES: Final = 8 << 20
_UPLOAD_TIMEOUT_S: Final = 120.0

_artifacts: dict[str, int] = {}
_artifacts_lock = threading.Lock()


class Carrier(ABC):
    """Takes bytes on their way to replicas; what a slot holds already is not shipped again."""

    def __init__(self) -> None:
        self._held: dict[str, Parcel] = {}

    def ship(self, slot: str, data: bytes) -> Parcel:
        """Get `data` on its way; what the slot held before is released unless it is the same."""
        digest = digest_of(data)
        held = self._held.get(slot)
        if held is not None and held.digest == digest:
            return held
        self._held[slot] = self._shipped(slot, data, digest)
        _let_go(held)
        return self._held[slot]

    def close(self) -> None:
        """Release everything."""
        while self._held:
            _let_go(self._held.popitem()[1])

    @abstractmethod
    def _shipped(self, slot: str, data: bytes, digest: str) -> Parcel:
        """Get `data` on its way, by what can carry its size."""


def carrier_for(
    spark: SparkSession, run: str, exchange: str | None, submit: Callable[[DataFrame, str, float], Any]
) -> Carrier:
    """The carrier for a session.

    Args:
        spark: the session.
        run: the run's id.
        exchange: `exchange_dir`, or None.
        submit: runs a DataFrame as a job: (frame, description, timeout in seconds).
    """
    return _ConnectCarrier(spark, run, exchange, submit) if is_connect(spark) else _ClassicCarrier(spark)


def artifact_bytes(spark: SparkSession) -> int:
    """Bytes of artifacts that fits have left with a Spark Connect session so far."""
    with _artifacts_lock:
        return _artifacts.get(access_to(spark).session, 0)


# -- a classic session -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Broadcast:
    """A Spark broadcast."""

    value: Any
    digest: str

    def open(self) -> bytes:
        """The executor's copy; fetched once by each."""
        return bytes(self.value.value)


@final
class _ClassicCarrier(Carrier):
    """Small things in the closure, others as broadcasts, destroyed when the next one replaces them."""

    def __init__(self, spark: SparkSession) -> None:
        super().__init__()
        self._context = spark.sparkContext

    def _shipped(self, slot: str, data: bytes, digest: str) -> Parcel:
        del slot  # a broadcast needs no name
        if len(data) > BROADCAST_FROM_BYTES:
            return _Broadcast(value=self._context.broadcast(data), digest=digest)
        return Inline(data=data, digest=digest)


def _let_go(parcel: Parcel | None) -> None:
    if isinstance(parcel, _Broadcast):
        with contextlib.suppress(Exception):  # the session may have been stopped, and the broadcast with it
            parcel.value.destroy()


# -- Spark Connect -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Artifact:
    """A file that the session's tasks find among their artifacts."""

    name: str
    digest: str

    def open(self) -> bytes:
        """Read it."""
        from pyspark import SparkFiles

        try:
            data = Path(SparkFiles.get(self.name)).read_bytes()
        except OSError as error:
            raise ReplicaLostError(f"artifact {self.name} did not reach this executor: {error}") from error
        return checked(data, self.digest, f"artifact {self.name}")


@final
class _ConnectCarrier(Carrier):
    """Small things in the closure; others through exchange_dir, else as artifacts while the session has room."""

    def __init__(
        self, spark: SparkSession, run: str, exchange: str | None, submit: Callable[[DataFrame, str, float], Any]
    ) -> None:
        super().__init__()
        self._spark: Any = spark
        self._run = run
        self._exchange = exchange
        self._submit = submit

    def _shipped(self, slot: str, data: bytes, digest: str) -> Parcel:
        if len(data) <= CLOSURE_LIMIT_BYTES:
            return Inline(data=data, digest=digest)
        if self._exchange is not None:
            return self._upload(slot, data, digest, self._exchange)
        remedy = "give exchange_dir=, a folder of shared storage that executors can reach, or take a new session"
        return _add_artifact(self._spark, f"{self._run}-{slot}", data, remedy)

    def _upload(self, slot: str, data: bytes, digest: str, folder: str) -> Stored:
        """Pieces in closures of small jobs, which write them to the storage: the client need not reach it."""
        stem = f"{run_folder(self._run)}/{slot}-{secrets.token_hex(4)}"
        names = []
        for piece, start in enumerate(range(0, len(data), _PIECE_BYTES)):
            name = f"{stem}.{piece}"
            task = partial(_write_task, folder, name, data[start : start + _PIECE_BYTES])
            frame = self._spark.range(0, 1, 1, 1).mapInArrow(task, "name string")
            self._submit(frame, "sparkdeep fit: parameters", _UPLOAD_TIMEOUT_S)
            names.append(name)
        return Stored(folder=folder, names=tuple(names), num_bytes=len(data), digest=digest)


def _add_artifact(spark: Any, what: str, data: bytes, remedy: str) -> _Artifact:
    session = access_to(spark).session
    with _artifacts_lock:
        used = _artifacts.get(session, 0)
        if used + len(data) > ARTIFACT_LIMIT_BYTES:
            raise PreflightError(
                f"{what}: {len(data) / 1e6:.1f} MB do not fit in a task's closure ({CLOSURE_LIMIT_BYTES / 1e6:.1f} MB), and of "
                f"this Spark Connect session's {ARTIFACT_LIMIT_BYTES / 1e6:.0f} MB of artifacts {used / 1e6:.1f} MB are taken: "
                f"{remedy}."
            )
        _artifacts[session] = used + len(data)
    name = f"sparkdeep-{what}-{secrets.token_hex(4)}"
    # A name once taken stays taken, so each file gets a new one; the server has its own copy when the call returns.
    with tempfile.TemporaryDirectory(prefix="sparkdeep-") as folder:
        path = Path(folder) / name
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        spark.addArtifacts(str(path), file=True)
    return _Artifact(name=name, digest=digest_of(data))


def _write_task(folder: str, name: str, data: bytes, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for _ in batches:
        pass
    with named_failures(), own_files("it wrote parameters to exchange_dir"):
        open_store(folder).write(name, data)
    yield pa.RecordBatch.from_pydict({"name": pa.array([name], pa.string())})


# -- a model that scores -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Carried:
    """What a broadcast is on a classic session: its `value` is the scorer, with the tensors put back in."""

    scorer: Any
    tensors: Parcel

    @property
    def value(self) -> Any:
        """The scorer, on an executor."""
        return dataclasses.replace(self.scorer, tensors=bytes(self.tensors.open()))


def carried(spark: SparkSession, scorer: Any) -> Any:
    """A scorer on its way to executors: its `value` there is what was given here.

    Args:
        spark: the session.
        scorer: a dataclass with a field `tensors` of bytes, and `uid`.

    Raises:
        PreflightError: it is too large for what is left of a Spark Connect session.
    """
    if not is_connect(spark):
        return spark.sparkContext.broadcast(scorer)
    data = scorer.tensors
    tensors: Parcel = Inline(data=data, digest=digest_of(data))
    if len(data) > CLOSURE_LIMIT_BYTES:
        tensors = _add_artifact(
            spark, f"model-{secrets.token_hex(4)}", data, "score on a classic session, or take a new session"
        )
    return _Carried(scorer=dataclasses.replace(scorer, tensors=b""), tensors=tensors)
