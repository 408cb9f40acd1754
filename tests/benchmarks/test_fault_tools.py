"""What the tests of faults look and strike with: the leak oracle's eyes and the proxy, without Spark."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from leaks import at_a_run, own_sockets
from tcp_proxy import LineFault, TcpProxy

WORKER = "import sys, time; held = open(sys.argv[2]) if sys.argv[2:] else None; print('up', flush=True); time.sleep(60)"


@pytest.fixture
def worker(tmp_path):
    """Starts processes that look like Python workers with local directories in `tmp_path`."""
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, "pyspark.daemon", *map(str, arguments)],
            env={**os.environ, "SPARK_LOCAL_DIRS": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(timeout=10)


def test_workers_that_are_stopped_hold_a_runs_files_or_have_no_executor_are_seen(tmp_path, worker):
    folder = tmp_path / "sparkdeep-run"
    folder.mkdir()
    (folder / "shard").touch()
    assert at_a_run([tmp_path]) == []
    stopped, holding, orphan = worker(), worker(folder / "shard"), worker()
    stopped.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 5
    while ": stopped: " not in str(found := at_a_run([tmp_path])):
        assert time.monotonic() < deadline, found
    reasons = {int(line.partition(":")[0]): line.split(": ")[1] for line in found}
    assert reasons == {
        stopped.pid: "stopped",
        holding.pid: "holds files of a run",
        orphan.pid: "has no executor",
    }
    assert at_a_run([tmp_path / "another"]) == []


def test_listening_ports_and_the_coordinators_unix_socket_are_seen():
    before = own_sockets()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as near:
        near.bind("\0sparkdeep-of-a-test")
        near.listen()
        more = set(own_sockets()) - set(before)
        assert more == {f"port {server.getsockname()[1]}", "@sparkdeep-of-a-test"}
    assert own_sockets() == before


@pytest.fixture
def sink():
    """A server that counts what comes in on each connection, and how it ended."""
    got = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                sock, _ = server.accept()
            except OSError:
                return
            entry = {"bytes": 0, "end": ""}
            got.append(entry)
            with sock:
                try:
                    while data := sock.recv(1 << 16):
                        entry["bytes"] += len(data)
                    entry["end"] = "closed"
                except ConnectionResetError:
                    entry["end"] = "reset"

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield server.getsockname(), got
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(timeout=5)


def sent_through(proxy_at, replica, size, timeout=20.0):
    """Send a hello and `size` bytes; returns how many seconds that took, or the error."""
    began = time.monotonic()
    with socket.create_connection(proxy_at, timeout=timeout) as sock:
        try:
            sock.sendall(b'{"replica": %d}' % replica)
            time.sleep(0.1)
            sock.sendall(bytes(size))
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1024):
                pass
        except OSError as error:
            return error
    return time.monotonic() - began


@pytest.mark.parametrize("how", ["cut", "dead", "slow"])
def test_the_proxy_strikes_the_named_replica_once_and_nobody_else(tmp_path, sink, how):
    target, got = sink
    fault = LineFault(tmp_path / "sign", 1, how, after_bytes=100_000, bytes_per_s=400_000)
    with TcpProxy(("127.0.0.1", 0), target, [fault]) as proxy:
        at = proxy.address
        sent_through(at, 1, 300_000)
        assert fault.struck == 0
        fault.sign.touch()
        sent_through(at, 0, 300_000)
        assert fault.struck == 0
        took = sent_through(at, 1, 300_000, timeout=1.5 if how == "dead" else 20.0)
        proxy.check_fired()
        sent_through(at, 1, 300_000)
        proxy.check_fired()
    deadline = time.monotonic() + 20.0
    while (len(got) < 4 or not got[3]["end"]) and time.monotonic() < deadline:
        time.sleep(0.01)  # the sink takes one connection after the other
    sizes = [entry["bytes"] for entry in got]
    whole = 300_000 + len(b'{"replica": 1}')
    assert [sizes[0], sizes[1], sizes[3]] == [whole] * 3
    if how == "slow":
        assert sizes[2] == whole
        assert took > 0.4
    else:
        assert 50_000 < sizes[2] < whole
