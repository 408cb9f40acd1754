"""Tiny Spark jobs that look around where replicas would run; each under a tag and a deadline."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from pyspark import BarrierTaskContext, TaskContext
from pyspark.sql import SparkSession

from sparkdeep.errors import ConfigError, CoordinatorUnreachableError, SparkdeepError
from sparkdeep.spark.doctor.executor_checks import LocalDir, Sight, sight_from_json, sight_to_json
from sparkdeep.spark.session.failures import named_failures
from sparkdeep.spark.session.jobs import SparkJob, mapped
from sparkdeep.spark.session.placement import resolve_device
from sparkdeep.storage.disks import volume_of

__all__ = ["MAX_TASKS", "Look", "look", "package_versions"]

MAX_TASKS: Final = 128
"""At most this many tasks in one look: enough to meet every kind of executor, few enough to dial the driver at once."""

_DIAL_TIMEOUT_S: Final = 3.0
_PACKAGES: Final = ("torch", "sparkdeep", "numpy", "pyarrow", "pyspark")


@dataclass(frozen=True, kw_only=True)
class Look:
    """What every task of a look needs to know."""

    tag: str
    host: str
    """Of the driver's port to dial; "" for none."""
    port: int
    token: bytes = field(repr=False)
    certificate: bytes = b""
    """See `plans.Address`."""


def package_versions() -> dict[str, str]:
    """Versions here: of Python (major.minor), and of the packages that are installed."""
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in _PACKAGES:
        try:
            versions[name] = str(import_module(name).__version__)
        except ImportError:
            continue  # the comparison then calls it missing
    return versions


def look(
    spark: SparkSession, job: Look, num_tasks: int | None, *, barrier: bool, profile: Any, timeout_s: float
) -> list[Sight]:
    """Run `num_tasks` tasks that look around.

    Args:
        spark: the session.
        job: what the tasks need to know.
        num_tasks: None for as many as Spark gives a range by itself: its default parallelism, the cores that it sees.
        barrier: whether in a barrier stage.
        profile: the stage's resource profile, or None.
        timeout_s: for the whole job, waiting for slots included.

    Raises:
        ReplicaLostError: it did not end in time, and was canceled; or Spark lost a task.
        SparkdeepError: why it failed, where it can be named; else what Spark raised.
    """
    frame = spark.range(0, 1 << 20) if num_tasks is None else spark.range(0, num_tasks, 1, num_tasks)
    frame = mapped(frame, partial(look_task, job), "sight string", barrier=barrier, profile=profile)
    what = f"the look at {'a barrier stage' if barrier else 'plain tasks'}"
    running = SparkJob(spark, frame, tag=job.tag, description=f"sparkdeep doctor: {what}")
    return [sight_from_json(row["sight"]) for row in running.result(timeout_s, what)]


def look_task(job: Look, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Look around on an executor; yields one row, a `Sight` as JSON."""
    with named_failures():
        for _ in batches:
            pass  # a Python worker whose input is not read to its end is not used again
        context = TaskContext.get()
        assert context is not None, "runs in a task"
        versions = package_versions()  # imports torch, so that what follows is measured with it
        folders = [folder for folder in os.environ.get("SPARK_LOCAL_DIRS", "").split(",") if folder]
        gpus = context.resources().get("gpu")
        addresses = list(gpus.addresses) if gpus else []
        device, device_problem = _device(addresses)
        volumes = [volume_of(folder) for folder in folders if Path(folder).is_dir()]
        dial_s, dial_problem = _dial(job, context.partitionId(), versions) if job.host else (None, "")
        sight = Sight(
            task=context.partitionId(),
            host=_host(context),
            executor=",".join(folders) or str(os.getppid()),
            barrier=isinstance(context, BarrierTaskContext),
            cpus=context.cpus(),
            versions=versions,
            gpus=addresses,
            cuda_devices=_cuda_devices() if "torch" in versions else 0,
            device=device,
            device_problem=device_problem,
            dial_s=dial_s,
            dial_problem=dial_problem,
            resident_bytes=_resident_bytes(),
            address_limit_bytes=_address_limit_bytes(),
            local_dirs=[LocalDir(path=v.path, free_bytes=v.free_bytes, kind=v.kind) for v in volumes],
        )
    yield pa.RecordBatch.from_pydict({"sight": pa.array([sight_to_json(sight)], pa.string())})


def _host(context: TaskContext) -> str:
    if isinstance(context, BarrierTaskContext):
        # As Spark names it; several executors of one machine may have names of their own.
        address = str(context.getTaskInfos()[context.partitionId()].address)
        return address.rsplit(":", 1)[0] or socket.gethostname()
    return socket.gethostname()


def _device(addresses: list[str]) -> tuple[str, str]:
    try:
        return resolve_device("auto", addresses, os.environ.get("CUDA_VISIBLE_DEVICES")), ""
    except ConfigError as error:
        return "", str(error)


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count()  # asks NVML, and leaves CUDA itself alone in a worker that is used again


def _dial(job: Look, task: int, versions: dict[str, str]) -> tuple[float | None, str]:
    if "torch" not in versions:
        return None, ""  # a replica would not get as far as dialing
    from sparkdeep.protocol.messages import Address, Hello, to_header
    from sparkdeep.replica.link import ReplicaLink

    began = time.perf_counter()
    try:
        channel = ReplicaLink.dial(
            Address(host=job.host, port=job.port, certificate=job.certificate),
            job.token,
            connect_timeout_s=_DIAL_TIMEOUT_S,
            who=f"task {task}",
        )
        try:
            hello = Hello(
                run=job.tag,
                stage="doctor",
                replica=task,
                host=socket.gethostname(),
                pid=os.getpid(),
                device="",
                versions=versions,
                rows={},
                digest="",
                shard="",
            )
            channel.send("hello", to_header(hello))
            channel.command()
        finally:
            channel.close()
    except CoordinatorUnreachableError as error:
        return None, f"no connection to {job.host}:{job.port} within {_DIAL_TIMEOUT_S:g} s ({error.__cause__})"
    except SparkdeepError as error:
        return None, f"{job.host}:{job.port} took the connection, but did not answer as the driver: {error}"
    return time.perf_counter() - began, ""


def _resident_bytes() -> int:
    import resource

    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()


def _address_limit_bytes() -> int | None:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit
