"""A standalone Spark cluster on this machine: a master and workers on loopback addresses, to Spark different hosts."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, final

__all__ = [
    "HOSTS",
    "LocalCluster",
    "accepts",
    "environment",
    "executor_pid",
    "free_port",
    "kill_executor",
    "spark_class",
    "wait_for",
]

HOSTS: Final = ("127.0.0.2", "127.0.0.3")
_START_S: Final = 60.0
_STOP_S: Final = 15.0


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def spark_class() -> str:
    """The program that starts Spark's classes."""
    import pyspark

    return str(Path(pyspark.__file__).parent / "bin" / "spark-class")


def environment(python_path: Sequence[Path | str], **more: str) -> dict[str, str]:
    """The environment of the cluster's processes.

    Args:
        python_path: folders that Python workers import from.
        more: further variables.
    """
    return {
        **os.environ,
        "PYSPARK_PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(str(path) for path in python_path),
        "SPARK_NO_DAEMONIZE": "1",
        "SPARK_DAEMON_MEMORY": "256m",
        **more,
    }


def accepts(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        with socket.create_connection((host, port), timeout=0.5):
            return True
    except OSError:
        return False


def wait_for(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: naming `what`.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.1)


@final
@final
class LocalCluster:
    """Its processes, and what it takes to hurt them.

    Args:
        root: an empty folder for logs, work and Spark's local directories.
        python_path: folders that Python workers import from.
        hosts: an address of 127.0.0.0/8 for each worker.
        cores: of each worker, with a gigabyte each; 2 let a second application run beside the first.

    Raises:
        TimeoutError: the master does not listen.
    """

    def __init__(
        self, root: Path, python_path: Sequence[Path | str], *, hosts: Sequence[str] = HOSTS, cores: int = 1
    ) -> None:
        self.root = root
        self.cores = cores
        self.hosts = tuple(hosts)
        self.port = free_port()
        self.url = f"spark://127.0.0.1:{self.port}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._python_path = list(python_path)
        try:
            self._start(
                "master",
                "org.apache.spark.deploy.master.Master",
                *("--host", "127.0.0.1", "--port", str(self.port), "--webui-port", "0"),
                SPARK_LOCAL_IP="127.0.0.1",
            )
            wait_for(lambda: accepts("127.0.0.1", self.port), _START_S, "the master to listen")
            for host in self.hosts:
                self.start_worker(host)
        except BaseException:
            self.stop()
            raise

    def _start(self, name: str, *command: str, **more: str) -> None:
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(  # noqa: S603 (Spark's own program)
                [spark_class(), *command],
                env=environment(self._python_path, **more),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_worker(self, host: str) -> None:
        """Start a worker, in place of the one before on its address."""
        self._start(
            host,
            "org.apache.spark.deploy.worker.Worker",
            self.url,
            *("--host", host, "--cores", str(self.cores), "--memory", f"{self.cores}g", "--webui-port", "0"),
            *("--work-dir", str(self.root / f"work-{host}")),
            SPARK_LOCAL_IP=host,
            SPARK_LOCAL_DIRS=str(self.local_dir(host)),
        )

    def local_dir(self, host: str) -> Path:
        """Where executors of `host` keep their files."""
        path = self.root / f"local-{host}"
        path.mkdir(exist_ok=True)
        return path

    def executor_pid(self, host: str) -> int | None:
        """The process of the executor on `host`, or None."""
        return executor_pid(self.root, host)

    def kill_executor(self, host: str, *, delete_folders: bool) -> int:
        """SIGKILL, as a machine that goes away; returns its process.

        Args:
            host: whose executor.
            delete_folders: whether its files go too.
        """
        return kill_executor(self.root, host, delete_folders=delete_folders)

    def stop(self) -> None:
        """End every process: by request, then by force."""
        for process in self.processes.values():
            if process.pid > 1 and process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(timeout=_STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=_STOP_S)


def executor_pid(root: Path, host: str) -> int | None:
    """The process of the executor on `host` of the cluster whose folder is `root`, or None."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                folder = str((entry / "cwd").readlink())
            except OSError:
                continue
            ours = f"spark://Worker@{host}:" in " ".join(line) and str(root) in folder
            if "org.apache.spark.executor.CoarseGrainedExecutorBackend" in line and ours:
                return int(entry.name)
    return None


def kill_executor(root: Path, host: str, *, delete_folders: bool) -> int:
    """As the cluster's method of this name, for who has its folder only."""
    pid = executor_pid(root, host)
    assert pid is not None, f"no executor runs on {host}"
    assert pid > 1, "0 and 1 are never ours"
    os.kill(pid, signal.SIGKILL)
    if delete_folders:
        for folder in (root / f"local-{host}").glob("spark-*/executor-*"):
            shutil.rmtree(folder, ignore_errors=True)
    return pid
