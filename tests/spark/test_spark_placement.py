"""Replicas on the GPUs that Spark gives out (a made-up discovery script), and replicas in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from spark_models import WITH_STATE, ChattyDropped, Trap, estimator, same_bits, weights

from sparkdeep.errors import UserCodeError

pytestmark = pytest.mark.spark

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """What `gpu_program.py` found on a local cluster whose discovery script names two GPUs."""
    folder = tmp_path_factory.mktemp("gpu")
    script = folder / "discover.sh"
    script.write_text('#!/bin/sh\necho \'{"name": "gpu", "addresses": ["0", "1"]}\'\n')
    script.chmod(0o755)
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYSPARK_GATEWAY", "PYSPARK_SUBMIT_ARGS", "SPARK_ENV"))
    }
    program = subprocess.run(
        [sys.executable, str(HERE / "gpu_program.py"), str(script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    lines = [line for line in program.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, program.stderr[-8000:]
    return json.loads(lines[0].removeprefix("ANSWER "))


@pytest.mark.jobs
@pytest.mark.fault(rows=[35], phases="TR")
def test_each_task_of_a_stage_is_given_a_gpu_of_its_own(answer):
    plain, renumbered, forced, visible = zip(*answer["devices"], strict=True)
    assert sorted(plain) == ["cuda:0", "cuda:1"]
    assert sorted(renumbered) == ["cuda:0", "cuda:1"]
    assert all(a != b for a, b in zip(plain, renumbered, strict=True))  # CUDA_VISIBLE_DEVICES=1,0 swaps them
    assert set(forced) == {"cpu"}
    assert set(visible) == {os.environ.get("CUDA_VISIBLE_DEVICES", "not set by us")}


@pytest.mark.jobs
def test_device_cpu_trains_whatever_spark_gave(answer):
    assert answer["cpu"] == "it trained"
    assert answer["spawned"] == "it trained"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.jobs
@pytest.mark.fault(rows=[35], phases="PF")
def test_a_gpu_that_torch_does_not_see_is_named(answer):
    assert answer["auto"].startswith("PreflightError: replica ")
    assert "was given cuda:" in answer["auto"]
    assert "sees no CUDA device" in answer["auto"]
    assert "device='cpu'" in answer["auto"]


@pytest.mark.jobs
def test_cpus_and_gpus_a_worker_become_a_profile_of_the_stage(answer):
    assert answer["profile"] == "it trained"
    assert answer["too many"].startswith("PreflightError: gpus_per_worker=3")
    assert "spark.executor.resource.gpu.amount=2" in answer["too many"]


def children():
    """Processes that run a replica of their own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"sparkdeep.spark.tasks.child" in words:
            found.append(int(path.parent.name))
    return set(found)


def gone(before, within_s=10.0, *, left=0):
    """Whether no more than `left` of the children that came since are there."""
    deadline = time.monotonic() + within_s
    while len(children() - before) > left and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(children() - before) <= left


def test_a_spawned_replica_trains_to_the_same_bits_and_ends_with_the_stage(blobs, with_state, capsys):
    before = children()
    seen = []
    options = {
        **WITH_STATE,
        "model": ChattyDropped,
        "buffers": {"said": "local"},
        "callbacks": [lambda r: seen.append(children() - before)],
    }
    spawned = estimator(worker_process="spawn", **options).fit(blobs)
    assert len(seen[0]) == 2
    assert same_bits(weights(spawned), weights(with_state))
    assert gone(before)
    assert "[replica 1] hello from process" in capsys.readouterr().out


def test_an_exception_in_a_spawned_replica_keeps_its_traceback_replica_and_host(spark):
    rows = [([float(i)] + [0.0] * 7, 0) for i in range(200)]
    frame = spark.createDataFrame(rows, "pixels array<double>, label bigint")
    before = children()
    slow = partial(torch.optim.SGD, lr=1e-9)
    with pytest.raises(UserCodeError, match=r"the mark 150\.0 came up") as caught:
        estimator(model=partial(Trap, 150.0), worker_process="spawn", optimizer=slow).fit(frame)
    assert caught.value.replica in {0, 1}
    assert caught.value.host
    assert "spark_models.py" in caught.value.traceback_text
    assert gone(before)


PARENT = """
import sys
from sparkdeep.spark.tasks import child
from sparkdeep.spark.tasks.replica_tasks import ReplicaTask
from stuck import Stuck
child.run_in_child(Stuck())
"""

STUCK = """
import os, pathlib, time

class Stuck:
    replica, host = 0, "here"

    def __reduce__(self):
        return (hold, ())

def hold():
    (pathlib.Path(__file__).parent / f"held-{os.getppid()}").touch()
    time.sleep(120)
"""


def test_a_child_dies_with_its_parent_killed_or_terminated(tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK)
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    before = children()
    ends = [signal.SIGKILL, signal.SIGTERM]
    parents = [subprocess.Popen([sys.executable, "-c", PARENT], env={**os.environ, "PYTHONPATH": path}) for _ in ends]
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("held-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        # Both are held in the middle of unpickling, before they watch the pipe.
        assert {path.name for path in tmp_path.glob("held-*")} == {f"held-{parent.pid}" for parent in parents}
        for left, parent, end in zip((1, 0), parents, ends, strict=True):
            assert len(children() - before) == left + 1
            parent.send_signal(end)
            parent.wait(timeout=10)
            assert gone(before, left=left)
    finally:
        for parent in parents:
            parent.kill()
            parent.wait()
