"""The daemon forks from one thread only, or not at all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from sparkdeep.spark.daemon import refusal

# The daemon up to the point where it would serve Spark: there it prints what it is.
_PROGRAM = """
import os, sys, types
{before}
from sparkdeep.spark import daemon
def manager():
    torch = sys.modules["torch"]
    pid = os.fork()
    if pid == 0:
        os._exit(0 if float(torch.ones(300, 300).mm(torch.ones(300, 300)).sum()) == 300**3 else 1)
    print("served", len(os.listdir("/proc/self/task")), torch.cuda.is_initialized(), os.environ.get("OPENBLAS_NUM_THREADS"),
          os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
# Not imported to be patched: Spark 3.5 would import numpy with it, and that starts threads where nobody tells it not to.
sys.modules["pyspark.daemon"] = types.SimpleNamespace(manager=manager)
daemon.main()
"""


def start(before="", **environment):
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(before=before)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux tells of all threads")
def test_it_serves_from_one_thread_without_cuda_and_what_it_forks_computes():
    done = start(OMP_NUM_THREADS="2")
    assert done.stdout.split() == ["served", "1", "False", "None", "0"], done.stderr


def test_it_refuses_to_fork_when_an_import_has_started_a_thread():
    done = start("import threading; threading.Thread(target=threading.Event().wait, daemon=True, name='agent').start()")
    assert (done.returncode, done.stdout) == (1, "")
    assert "sparkdeep.spark.daemon: 2 threads after its imports" in done.stderr
    assert "Unset spark.python.daemon.module" in done.stderr


@pytest.mark.parametrize(
    ("threads", "cuda", "message"),
    [
        (["python"], False, "^$"),
        (
            ["python", "agent"],
            False,
            r"2 threads after its imports \(python, agent\).*Unset spark.python.daemon.module",
        ),
        (["python"], True, "initialized CUDA.*Unset spark.python.daemon.module"),
    ],
)
def test_what_it_refuses_is_said_with_the_remedy(threads, cuda, message):

    assert re.search(message, refusal(threads, cuda=cuda))
