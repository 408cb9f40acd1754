"""A replica in a process of its own: its CUDA context ends with it, whatever becomes of the Python worker."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any, Final

import cloudpickle

from sparkdeep import errors
from sparkdeep.errors import NonFiniteError, ReplicaLostError, SparkdeepError, UserCodeError
from sparkdeep.spark.tasks.replica_tasks import ReplicaTask, run_replica

__all__ = ["run_in_child"]

_PR_SET_PDEATHSIG: Final = 1
_FAILED: Final = 3


def run_in_child(task: ReplicaTask) -> None:
    """Run the replica in a new interpreter and wait for its end.

    The child ends with this process, however that ends: it watches the pipe that it was started through, and on Linux
    asks to be killed with its parent.

    Raises:
        SparkdeepError: the named error that ended the child.
        ReplicaLostError: it died without one.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.Popen(
        [sys.executable, "-m", "sparkdeep.spark.tasks.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        payload = cloudpickle.dumps(task)
        child.stdin.write(len(payload).to_bytes(8, "big") + payload)
        child.stdin.flush()
        report = child.stdout.read()
        code = child.wait()
    finally:
        child.stdin.close()
        if child.poll() is None:
            child.kill()
            child.wait()
    if code == _FAILED:
        content = json.loads(report)
        kind = getattr(errors, content["type"], SparkdeepError)
        parts = content["parts"] if kind in {UserCodeError, NonFiniteError} else {}
        raise kind(content["message"], **parts)
    if code != 0:
        raise ReplicaLostError(f"the process of replica {task.replica} on {task.host} ended with code {code}.")


def _watch_parent() -> None:
    sys.stdin.buffer.read()  # ends when the parent does
    os._exit(1)


def main() -> int:
    """Read a task from stdin and run it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    size = int.from_bytes(sys.stdin.buffer.read(8), "big")
    task = cloudpickle.loads(sys.stdin.buffer.read(size))
    threading.Thread(target=_watch_parent, daemon=True).start()
    report = os.dup(1)
    os.dup2(2, 1)  # what user code prints past sys.stdout belongs to the executor's log, not into the report
    try:
        run_replica(task)
    except Exception as error:  # noqa: BLE001 (passed on to the parent, which raises it)
        os.write(report, json.dumps(_described(error)).encode())
        return _FAILED
    return 0


def _described(error: Exception) -> dict[str, Any]:
    name = type(error).__name__ if isinstance(error, SparkdeepError) else "SparkdeepError"
    parts: dict[str, Any] = {}
    if isinstance(error, UserCodeError):
        parts = {"replica": error.replica, "host": error.host, "traceback_text": error.traceback_text[-32768:]}
    elif isinstance(error, NonFiniteError):
        parts = {"round_number": error.round, "replica": error.replica}
    return {"type": name, "message": str(error)[:16384], "parts": parts}


if __name__ == "__main__":
    code = main()
    # The watching thread is a daemon that holds stdin; flush and leave without waiting for it.
    sys.stderr.flush()
    os._exit(code)
