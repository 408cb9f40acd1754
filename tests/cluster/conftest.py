"""A standalone master and two workers on different loopback addresses: to Spark, two hosts."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pyspark = pytest.importorskip("pyspark")

HOSTS = ("127.0.0.2", "127.0.0.3")


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def spark_class():
    return str(Path(pyspark.__file__).parent / "bin" / "spark-class")


def environment(**more):
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests.parent), str(tests), str(tests / "cluster")])
    return {
        **os.environ,
        "PYSPARK_PYTHON": sys.executable,
        "PYTHONPATH": path,
        "SPARK_NO_DAEMONIZE": "1",
        "SPARK_DAEMON_MEMORY": "256m",
        **more,
    }


class Cluster:
    """Its processes, and what a test needs to hurt them."""

    def __init__(self, root: Path):
        self.root = root
        self.port = free_port()
        self.url = f"spark://127.0.0.1:{self.port}"
        self.processes = {}
        self._start(
            "master",
            "org.apache.spark.deploy.master.Master",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--webui-port",
            "0",
            SPARK_LOCAL_IP="127.0.0.1",
        )
        wait_for(lambda: accepts("127.0.0.1", self.port), 60, "the master to listen")
        for host in HOSTS:
            self.start_worker(host)

    def _start(self, name, *command, **more):
        log = (self.root / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            [spark_class(), *command], env=environment(**more), stdout=log, stderr=log, start_new_session=True
        )

    def start_worker(self, host):
        self._start(
            host,
            "org.apache.spark.deploy.worker.Worker",
            self.url,
            "--host",
            host,
            "--cores",
            "1",
            "--memory",
            "1g",
            "--webui-port",
            "0",
            "--work-dir",
            str(self.root / f"work-{host}"),
            SPARK_LOCAL_IP=host,
            SPARK_LOCAL_DIRS=str(self.local_dir(host)),
        )

    def local_dir(self, host):
        path = self.root / f"local-{host}"
        path.mkdir(exist_ok=True)
        return path

    def executor_pid(self, host):
        """The pid of the executor JVM on `host`, or None."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                except OSError:
                    continue
                ours = f"spark://Worker@{host}:" in " ".join(line) and str(self.root) in os.readlink(entry / "cwd")
                if "org.apache.spark.executor.CoarseGrainedExecutorBackend" in line and ours:
                    return int(entry.name)
        return None

    def kill_executor(self, host, *, delete_folders):
        """SIGKILL, as a machine that goes away; returns its pid."""
        pid = self.executor_pid(host)
        assert pid is not None
        assert pid > 1
        os.kill(pid, signal.SIGKILL)
        if delete_folders:
            for folder in self.local_dir(host).glob("spark-*/executor-*"):
                shutil.rmtree(folder, ignore_errors=True)
        return pid

    def stop(self):
        for process in self.processes.values():
            if process.pid > 1 and process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=15)


def accepts(host, port):
    try:
        with socket.create_connection((host, port), timeout=0.5):
            return True
    except OSError:
        return False


def wait_for(condition, timeout_s, what):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    running = Cluster(tmp_path_factory.mktemp("cluster"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def cluster_session(cluster):
    from pyspark.sql import SparkSession

    os.environ.update(environment(SPARK_LOCAL_IP="127.0.0.1"))
    session = (
        SparkSession.builder.master(cluster.url)
        .appName("sparkdeep cluster tests")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.executor.memory", "512m")
        .config("spark.executor.cores", "1")
        .config("spark.cores.max", "2")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.scheduler.barrier.maxConcurrentTasksCheck.interval", "1s")
        .config("spark.task.maxFailures", "1")
        .config("spark.locality.wait", "3s")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")

    def both_up():
        return all(cluster.executor_pid(host) for host in HOSTS)

    wait_for(both_up, 60, "both executors")
    yield session
    session.stop()
