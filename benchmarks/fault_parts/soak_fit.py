"""One soak in a process of its own: a fit undisturbed, the same fit under faults, and what the driver holds meanwhile."""

from __future__ import annotations

import collections
import functools
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from local_cluster import HOSTS, LocalCluster, environment, executor_pid, kill_executor, wait_for

from fault_parts.soak_plan import ROUNDS_AN_EPOCH, STALL_S, plan_faults, slope

__all__ = ["LoseExecutor", "main", "soak"]

_BENCHMARKS: Final = Path(__file__).resolve().parents[1]
# Dealt by a hash: neither shard has more than 320, which are 20 steps of 16 rows.
_ROWS: Final = 600


class LoseExecutor:
    """Kills the executor on one of the hosts; travels as its folder and the host.

    Args:
        root: the cluster's folder.
        host: whose executor.
        delete_folders: whether its disk goes too.
    """

    def __init__(self, root: Path, host: str, *, delete_folders: bool) -> None:
        self._root, self._host, self._delete = root, host, delete_folders

    def __call__(self) -> None:
        """Wait for it where a fault just before has taken it, and kill it."""
        wait_for(lambda: executor_pid(self._root, self._host), 60.0, f"the executor on {self._host}")
        kill_executor(self._root, self._host, delete_folders=self._delete)


def _injector(folder: Path, root: Path, faults: list[tuple[int, str, int]]) -> Any:
    from sparkdeep.testing.injection import Injector

    injector = Injector(folder)
    for number, kind, replica in faults:
        if kind == "worker killed in training":
            injector.kill_at("train", number, replica)
        elif kind == "worker killed while sending":
            injector.kill_at("transfer", number, replica)
        elif kind == "worker stopped":
            injector.kill_at("train", number, replica, signum=signal.SIGSTOP)
        elif kind == "update corrupted":
            injector.corrupt_at("transfer", number, replica)
        elif kind == "replica delayed":
            injector.delay_at("train", number, replica, seconds=0.3)
        else:
            lose = LoseExecutor(root, HOSTS[replica], delete_folders=kind.endswith("disk"))
            injector.call_at("average", number, action=lose)
    return injector


def _network() -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 3))


def _estimator(rounds: int, **settings: Any) -> Any:
    import torch
    from torch import nn

    from sparkdeep import TorchEstimator

    return TorchEstimator(
        model=_network,
        loss=nn.CrossEntropyLoss(),
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
        feature_cols=["x"],
        label_cols="y",
        num_workers=2,
        batch_size=16,
        epochs=rounds // ROUNDS_AN_EPOCH,
        sync_every=2,
        seed=1,
        progress=False,
        replica_state="durable",
        checkpoint_every=1,
        max_retries=6,
        retry_backoff_s=0.2,
        stall_timeout_s=STALL_S,
        **settings,
    )


def _frame(spark: Any) -> Any:
    import torch

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(_ROWS, 20, generator=generator)
    y = (x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    rows = [(a.tolist(), int(b)) for a, b in zip(x, y, strict=True)]
    return spark.createDataFrame(rows, "x array<double>, y long")


class Watch:
    """What the driver's processes hold after every round.

    Args:
        jvm: the number of Spark's process.
        folders: whose files are counted.
    """

    def __init__(self, jvm: int, folders: list[Path]) -> None:
        self._jvm = jvm
        self._folders = folders
        self.samples: list[dict[str, float]] = []
        self.told: list[int] = []

    def __call__(self, record: Any) -> None:
        """Take a sample."""
        self.told.append(record.round)
        self.samples.append(
            {
                "driver_mb": _resident_mb("self"),
                "jvm_mb": _resident_mb(str(self._jvm)),
                "descriptors": len(list(Path("/proc/self/fd").iterdir())),
                "threads": len(list(Path("/proc/self/task").iterdir())),
                "files": sum(len(names) for folder in self._folders for _, _, names in _ours(folder)),
            }
        )


def _ours(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """What is ours below a folder: Spark's own files of executors that were killed stay, and are Spark's to remove."""
    for place, folders, names in os.walk(folder):
        if folder.name == "checkpoints" or "/sparkdeep-" in place:
            yield place, folders, names


def _resident_mb(process: str) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _session(cluster: LocalCluster) -> Any:
    from pyspark.sql import SparkSession

    os.environ.update(environment(_python_path(), SPARK_LOCAL_IP="127.0.0.1"))
    session = (
        SparkSession.builder.master(cluster.url)
        .appName("sparkdeep soak")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.executor.memory", "512m")
        .config("spark.executor.cores", "1")
        .config("spark.cores.max", "2")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.scheduler.barrier.maxConcurrentTasksCheck.interval", "1s")
        # Spark kills the worker of a cancelled task 2 to 4 s later, and was seen to miss one that was stopped: its task
        # then holds the slot for good. With this its executor goes instead.
        .config("spark.task.reaper.enabled", "true")
        .config("spark.task.reaper.pollingInterval", "2s")
        .config("spark.task.reaper.killTimeout", "20s")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")
    wait_for(lambda: all(cluster.executor_pid(host) for host in HOSTS), 60.0, "both executors")
    return session


def _python_path() -> list[Path]:
    return [_BENCHMARKS.parent, _BENCHMARKS]


def soak(rounds: int, seed: int, work: Path) -> dict[str, Any]:
    """Both fits on a cluster below `work`; what came of them, JSON-ready."""
    import torch

    from sparkdeep.stages.stage import Stage

    begun: list[int] = []
    train = Stage.train

    def counted(self: Stage, spec: Any, *arguments: Any, **more: Any) -> Any:
        begun.append(spec.round)
        return train(self, spec, *arguments, **more)

    faults = plan_faults(rounds, seed)
    cluster = LocalCluster(work, _python_path())
    try:
        session = _session(cluster)
        frame = _frame(session)
        began = time.monotonic()
        undisturbed = _estimator(rounds, checkpoint_dir=str(work / "quiet")).fit(frame)
        quiet_s = time.monotonic() - began
        injector = _injector(work / "plan", work, faults)
        jvm = session.sparkContext._jvm.java.lang.ProcessHandle.current().pid()
        watch = Watch(jvm, [work / "checkpoints", *(cluster.local_dir(host) for host in HOSTS)])
        estimator = _estimator(
            rounds, checkpoint_dir=str(work / "checkpoints"), callbacks=[watch], preprocess=injector.carrier()
        )
        began = time.monotonic()
        Stage.train = counted  # type: ignore[assignment, method-assign]
        with injector.installed():
            model = estimator.fit(frame)
        Stage.train = train  # type: ignore[method-assign]
        seconds = time.monotonic() - began
        ours, theirs = model.model.state_dict(), undisturbed.model.state_dict()
        differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
        fired = {fault.number for fault in injector.fired()}
        session.stop()
    finally:
        cluster.stop()
    last = watch.samples[-min(100, rounds // 2) :]
    return {
        "rounds": rounds,
        "seed": seed,
        "faults": dict(collections.Counter(kind for _, kind, _ in faults)),
        "planned": len(faults),
        "never happened": [faults[number] for number in range(len(faults)) if number not in fired],
        "seconds": round(seconds, 1),
        "undisturbed_seconds": round(quiet_s, 1),
        "differing tensors": differing,
        "same losses": [r.loss for r in model.history] == [r.loss for r in undisturbed.history],
        "rounds told": watch.told,
        "rounds begun": len(begun),
        "retries": sum(record.retries for record in model.history),
        "slopes": {key: slope([sample[key] for sample in last]) for key in last[0]},
        "over": len(last),
        "samples": watch.samples,
    }


def main() -> None:
    """Arguments: rounds, seed, an empty folder to work in, a file for the result as JSON."""
    rounds, seed, work, result = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message).300s")
    Path(result).write_text(json.dumps(soak(int(rounds), int(seed), Path(work))), encoding="utf-8")
