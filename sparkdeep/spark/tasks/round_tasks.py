"""What runs on executors when every round is a job: the replica's task, and the probe before the first."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import torch

from sparkdeep.errors import PreflightError, ProtocolError, ReplicaLostError
from sparkdeep.protocol.orders import Job, Reply
from sparkdeep.replica.job import Letter, obey
from sparkdeep.replica.link import LogStream
from sparkdeep.spark.session.failures import named_failures
from sparkdeep.spark.session.task import barrier_context, ready_device
from sparkdeep.spark.tasks.replica_tasks import open_program, placed, placed_anywhere
from sparkdeep.storage.disks import own_files
from sparkdeep.storage.opening import open_store
from sparkdeep.storage.store import run_folder
from sparkdeep.versions import versions

__all__ = ["PROBE_COLUMNS", "REPLY_COLUMNS", "RoundJob", "probe_task", "read_replies", "round_task"]

REPLY_COLUMNS: Final = "replica int, part int, header string, data binary"
PROBE_COLUMNS: Final = "task int, host string, versions string"
_PART_BYTES: Final = 16 << 20
_SEEN_TIMEOUT_S: Final = 15.0


@dataclass(frozen=True, kw_only=True)
class RoundJob:
    """What every task of one job needs to know."""

    job: Job
    shard_dir: str | None
    open_timeout_s: float
    """A replica that is not built within this time ends its process, which Spark reports."""
    stall_timeout_s: float
    """The same for one that, once built, has not finished a single batch for this long."""
    keeps_states: bool
    """Whether tasks are those of a barrier stage, each where its shard lies and the replica's state with it."""


def round_task(job: RoundJob, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Do the order for the shard whose manifest row the batches hold; yields the reply in parts."""
    with named_failures():
        order = job.job
        find = placed if job.keeps_states else placed_anywhere
        task = find(order.run, job.shard_dir, order.settings.device, batches)
        device = ready_device(task.device, task.num_threads, f"replica {task.replica} on {task.host}")
        with _watched(job.stall_timeout_s, first_s=job.open_timeout_s) as beat:
            letter = Letter(order, beat)
            with contextlib.redirect_stdout(LogStream(letter)) as lines:
                reply = obey(order, task, letter, open_program=open_program)
            lines.end()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the worker may idle until the next round, and others share the GPU
    yield from _parts(task.replica, reply, letter.lines)


@contextmanager
def _watched(timeout_s: float, *, first_s: float) -> Iterator[Callable[[], None]]:
    """Yields a function to call now and then; without a call for `timeout_s`, the process writes its stack and ends.

    Until the first call it has `first_s`, as importing and building take longer than a batch.

    Python cannot interrupt code that hangs in C, so the watchdog is the interpreter's own, outside its lock.
    """

    def watch(seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)

    watch(first_s)
    try:
        yield lambda: watch(timeout_s)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _parts(replica: int, reply: Reply, lines: Sequence[str]) -> Iterator[pa.RecordBatch]:
    crc, size = 0, 0
    for body in reply.bodies:
        crc, size = zlib.crc32(body, crc), size + memoryview(body).nbytes
    header = {**reply.header, "lines": list(lines), "body": {"bytes": size, "crc32": crc}}
    yield _row(replica, 0, json.dumps(header), None)
    part = 0
    for body in reply.bodies:
        view = memoryview(body).cast("B")
        for start in range(0, view.nbytes, _PART_BYTES):
            part += 1
            yield _row(replica, part, None, view[start : start + _PART_BYTES])


def _row(replica: int, part: int, header: str | None, data: memoryview | None) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(
        {
            "replica": pa.array([replica], pa.int32()),
            "part": pa.array([part], pa.int32()),
            "header": pa.array([header], pa.string()),
            "data": pa.array([data], pa.binary()),
        }
    )


def read_replies(batches: Sequence[pa.RecordBatch]) -> list[Reply]:
    """The replies that `round_task` gave, on the driver.

    Raises:
        ReplicaLostError: a part is missing or damaged.
    """
    headers: dict[int, dict[str, Any]] = {}
    parts: dict[int, dict[int, memoryview]] = {}
    for batch in batches:
        numbers, places = batch.column("replica").to_pylist(), batch.column("part").to_pylist()
        for row, (replica, part) in enumerate(zip(numbers, places, strict=True)):
            if part == 0:
                if replica in headers:
                    raise ProtocolError(f"replica {replica} replied twice.")
                headers[replica] = json.loads(batch.column("header")[row].as_py())
            else:
                parts.setdefault(replica, {})[part] = memoryview(batch.column("data")[row].as_buffer())
    return [_whole(replica, header, parts.get(replica, {})) for replica, header in sorted(headers.items())]


def _whole(replica: int, header: dict[str, Any], parts: dict[int, memoryview]) -> Reply:
    body = b"".join(parts[part] for part in sorted(parts))
    declared = header["body"]
    if (len(body), zlib.crc32(body)) != (declared["bytes"], declared["crc32"]):
        raise ReplicaLostError(
            f"the reply of replica {replica} was damaged on its way: {len(body)} bytes of {declared['bytes']}, or another "
            "checksum; the round is void.",
            replica=replica,
        )
    return Reply(header=header, bodies=(body,))


def probe_task(
    run: str, count: int, exchange: str | None, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Report where this task runs; with `exchange`, check that every other task's file can be seen there."""
    for _ in batches:
        pass
    with named_failures():
        context = barrier_context("probing")
        number = context.partitionId()
        if exchange is not None:
            _see_others(exchange, run, number, count)
        host = str(context.getTaskInfos()[number].address).rsplit(":", 1)[0]
    yield pa.RecordBatch.from_pydict(
        {
            "task": pa.array([number], pa.int32()),
            "host": pa.array([host], pa.string()),
            "versions": pa.array([json.dumps(versions())], pa.string()),
        }
    )


def _see_others(exchange: str, run: str, number: int, count: int) -> None:
    with own_files("it tried exchange_dir"):
        store = open_store(exchange)
        try:
            store.write(f"{run_folder(run)}/probe/{number}", b"")
        except OSError as error:
            raise PreflightError(f"exchange_dir={store.uri!r} cannot be written by executors: {error}.") from error
        deadline = time.monotonic() + _SEEN_TIMEOUT_S
        while len(store.list(f"{run_folder(run)}/probe")) < count:
            if time.monotonic() > deadline:
                raise PreflightError(
                    f"exchange_dir={store.uri!r}: executors do not see each other's files there. Give a folder of storage "
                    "that all of them share: a mounted path, or a URI that pyarrow opens (s3://, gs://, abfs://, hdfs://)."
                )
            time.sleep(0.05)
