"""A standalone master and two workers on different loopback addresses: to Spark, two hosts. Fixtures, see tests/conftest.py."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
from paths import ROOT, SUPPORT, TESTS

HOSTS = ("127.0.0.2", "127.0.0.3")
# JVMs that live for minutes: compiling well costs them more than it gains.
BRIEF = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
# Workers are forked with torch imported: a fault costs a moment, not an import. What is submitted to the cluster as a
# program of its own (test_submit.py) has Spark's own daemon.
FAULT_CONF = {
    "spark.python.daemon.module": "sparkdeep.spark.daemon",
    "spark.locality.wait": "1s",
    "spark.driver.extraJavaOptions": BRIEF,
    "spark.executor.extraJavaOptions": BRIEF,
}


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def spark_class():
    import pyspark

    return str(Path(pyspark.__file__).parent / "bin" / "spark-class")


def environment(**more):
    path = os.pathsep.join([str(ROOT), str(SUPPORT), str(TESTS / "cluster")])
    return {
        **os.environ,
        "PYSPARK_PYTHON": sys.executable,
        "PYTHONPATH": path,
        "SPARK_NO_DAEMONIZE": "1",
        "SPARK_DAEMON_MEMORY": "256m",
        "SPARK_DAEMON_JAVA_OPTS": BRIEF,
        **more,
    }


class Cluster:
    """Its processes, and what a test needs to hurt them.

    Args:
        root: a folder for its logs, local directories and temporary files.
        cores: of each worker; 2 let a second application run beside the first.
    """

    def __init__(self, root: Path, *, cores=1):
        self.root = root
        self.cores = cores
        self.port = free_port()
        self.url = f"spark://127.0.0.1:{self.port}"
        self._page = free_port()
        self._session = None
        self.processes = {}
        self.temp = root / "temp"
        self.temp.mkdir()
        self._start(
            "master",
            "org.apache.spark.deploy.master.Master",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--webui-port",
            str(self._page),
            SPARK_LOCAL_IP="127.0.0.1",
        )
        wait_for(lambda: accepts("127.0.0.1", self.port), 60, "the master to listen")
        for host in HOSTS:
            self.start_worker(host)
        # A session that begins before both are there has its executors on one host for good.
        wait_for(lambda: self.workers() == len(HOSTS), 60, "both workers to register")

    def _start(self, name, *command, **more):
        log = (self.root / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            [spark_class(), *command],
            env=environment(TMPDIR=str(self.temp), **more),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def start_worker(self, host):
        self._start(
            host,
            "org.apache.spark.deploy.worker.Worker",
            self.url,
            "--host",
            host,
            "--cores",
            str(self.cores),
            "--memory",
            f"{self.cores}g",
            "--webui-port",
            "0",
            "--work-dir",
            str(self.root / f"work-{host}"),
            SPARK_LOCAL_IP=host,
            SPARK_LOCAL_DIRS=str(self.local_dir(host)),
        )

    def session(self):
        """The one that tests share: its executors have all cores of the two hosts."""
        if self._session is None:
            import pyspark

            # Spark 3.5 has its own daemon there (.ci/lts.sh): nothing dies in those tests.
            conf = FAULT_CONF if pyspark.__version__ >= "4" else {}
            self._session = session_on(self.url, **{**conf, "spark.task.maxFailures": "1"})
            both_up(self, self._session)
        return self._session

    def end_session(self):
        """Stop the shared session, so that another one, or another program, has the cores."""
        if self._session is not None:
            self._session.stop()
            self._session = None

    def workers(self):
        """Workers that the master counts as alive."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._page}/json/", timeout=5) as page:
                told = json.load(page)
        except (OSError, ValueError):
            return 0
        return sum(worker["state"] == "ALIVE" for worker in told["workers"])

    def local_dir(self, host):
        path = self.root / f"local-{host}"
        path.mkdir(exist_ok=True)
        return path

    def executor_pid(self, host, application=""):
        """The pid of the executor JVM on `host`, of one application where its id is given; or None."""
        return executor_pid(str(self.root), host, application)

    def kill_executor(self, host, *, delete_folders, application=""):
        """SIGKILL, as a machine that goes away; returns its pid."""
        return kill_executor(str(self.root), host, delete_folders, application)

    def kill_worker(self, host):
        """SIGKILL of the worker daemon alone; its executor has to notice."""
        process = self.processes[host]
        assert process.pid > 1
        process.kill()
        process.wait(timeout=15)

    def kill_machine(self, host, application):
        """SIGKILL of the worker daemon and of what it started, and the executor's folders are gone."""
        process = self.processes[host]
        pid = self.executor_pid(host, application)
        assert pid is not None
        assert min(pid, process.pid) > 1
        folders = _variable(pid, "SPARK_EXECUTOR_DIRS").split(":")
        os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # of the same process group
            os.kill(pid, signal.SIGKILL)
        process.wait(timeout=15)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    def stop(self):
        self.end_session()
        for process in self.processes.values():
            if process.pid > 1 and process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=15)


def executor_pid(root, host, application=""):
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                where = os.readlink(entry / "cwd")
            except OSError:
                continue
            ours = f"spark://Worker@{host}:" in " ".join(line) and root in where
            if "org.apache.spark.executor.CoarseGrainedExecutorBackend" in line and ours and application in where:
                return int(entry.name)
    return None


def kill_executor(root, host, delete_folders, application=""):
    pid = executor_pid(root, host, application)
    assert pid is not None
    assert pid > 1
    folders = {Path(folder) for folder in _variable(pid, "SPARK_EXECUTOR_DIRS").split(":") if folder}
    os.kill(pid, signal.SIGKILL)
    if delete_folders:
        for folder in folders or Path(root, f"local-{host}").glob("spark-*/executor-*"):
            shutil.rmtree(folder, ignore_errors=True)
    return pid


def _variable(pid, name):
    """A variable of another process's environment; "" where it has none."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return next((pair.partition("=")[2] for pair in pairs if pair.startswith(f"{name}=")), "")


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


def session_on(url, **conf):
    """A session of two executors with one core each."""
    from pyspark.sql import SparkSession

    os.environ.update(environment(SPARK_LOCAL_IP="127.0.0.1"))
    settings = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.executor.memory": "512m",
        "spark.executor.cores": "1",
        "spark.cores.max": "2",
        "spark.sql.shuffle.partitions": "2",
        "spark.scheduler.barrier.maxConcurrentTasksCheck.interval": "1s",
        "spark.locality.wait": "3s",
        **conf,
    }
    builder = SparkSession.builder.master(url).appName("sparkdeep cluster tests")
    for name, value in settings.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    return session


def both_up(cluster, session):
    application = session.sparkContext.applicationId
    wait_for(lambda: all(cluster.executor_pid(host, application) for host in HOSTS), 60, "both executors")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    pytest.importorskip("pyspark")
    running = Cluster(tmp_path_factory.mktemp("cluster"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def cluster_session(cluster):
    return cluster.session()


@pytest.fixture(scope="session")
def fault_cluster(tmp_path_factory):
    """Two hosts with room for a second driver's executors beside the shared session's."""
    pytest.importorskip("pyspark")
    running = Cluster(tmp_path_factory.mktemp("faults"), cores=2)
    before = os.environ.get("TMPDIR")
    # Temporary files of the driver in a folder of their own: what is left there is ours.
    os.environ["TMPDIR"] = tempfile.tempdir = str(running.temp)
    yield running
    tempfile.tempdir = None
    if before is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before
    running.stop()


@pytest.fixture(scope="session")
def fault_session(fault_cluster):
    """One session for all faults, with Spark's own default of four failures a task."""
    session = session_on(fault_cluster.url, **FAULT_CONF)
    both_up(fault_cluster, session)
    yield session
    session.stop()
