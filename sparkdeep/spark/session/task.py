"""What a task can find out about where it runs: its context, host, device and folders."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pyspark import BarrierTaskContext, TaskContext

from sparkdeep.data.scratch import claim, sweep
from sparkdeep.errors import PreflightError

if TYPE_CHECKING:
    import torch
    from pyspark.sql import DataFrame

    from sparkdeep.protocol.messages import ShardFacts

__all__ = ["Shards", "barrier_context", "host_of", "local_dirs", "ready_device", "run_root", "task_context"]


class Shards(Protocol):
    """Persisted shards, one per replica; see `shard_source.ShardSource`."""

    num_workers: int
    frame: DataFrame
    """One manifest row per shard."""

    def renew(self) -> None:
        """Make them anew with the next job: each task then writes its shard where it runs."""

    def resize(self, num_workers: int) -> Sequence[ShardFacts]:
        """Make that many of them anew; returns what they hold."""

    def close(self) -> None:
        """Let go of them."""


def ready_device(name: str, num_threads: int, who: str) -> torch.device:
    """The device, with this worker's torch set to the task's threads.

    Raises:
        PreflightError: torch cannot use it here.
    """
    import torch  # only for replicas: a task that cleans up should not wait for it in a new worker

    torch.set_num_threads(num_threads)
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PreflightError(
            f"{who} was given {name}, but its torch {torch.__version__} sees no CUDA device. Install a CUDA build of "
            "torch on the executors, check the driver, or set device='cpu'."
        )
    return device


def barrier_context(what: str) -> BarrierTaskContext:
    """This barrier task's context.

    Raises:
        PreflightError: the engine does not run it as one.
    """
    context = TaskContext.get()
    if not isinstance(context, BarrierTaskContext):
        raise PreflightError(
            f"the {what} task is not in a barrier stage: this engine ignores mapInArrow(barrier=True). Disable native "
            "execution (Photon, Gluten, Comet, RAPIDS) for this session."
        )
    return context


def task_context() -> TaskContext:
    """This task's context, in a barrier stage or not."""
    context = TaskContext.get()
    assert context is not None, "this runs in a Spark task"
    return context


def host_of(context: TaskContext) -> str:
    """The host that this task runs on; of a barrier task, as Spark names it."""
    if not isinstance(context, BarrierTaskContext):
        return os.environ.get("SPARK_LOCAL_IP") or socket.gethostname()
    address = context.getTaskInfos()[context.partitionId()].address
    return str(address).rsplit(":", 1)[0] or socket.gethostname()


def local_dirs() -> list[str]:
    """The executor's local directories."""
    return [folder for folder in os.environ.get("SPARK_LOCAL_DIRS", "").split(",") if folder]


def run_root(run: str, shard_dir: str | None) -> Path:
    """This executor's folder for the run, after sweeping what dead runs left beside it."""
    folders = local_dirs()
    if shard_dir is not None:
        Path(shard_dir).mkdir(parents=True, exist_ok=True)
        folders = [shard_dir]
    sweep(folders, spare=run if shard_dir is not None else "")
    return claim(folders, run)
