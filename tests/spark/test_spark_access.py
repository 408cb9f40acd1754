"""Which stages have tasks that run, and which wait for a slot: by the scheduler, as Spark's status tracker may be ten seconds late."""

from __future__ import annotations

import time
from functools import partial

import pyarrow as pa
import pytest

from sparkdeep.spark.session.access import access_to
from sparkdeep.spark.session.jobs import SparkJob

pytestmark = pytest.mark.spark


def held(folder, batches):
    """Say that the task runs, and stay until the file "done" is there, a minute at most."""
    for batch in batches:
        (folder / f"runs-{batch.column(0)[0].as_py()}").touch()
    deadline = time.monotonic() + 60
    while not (folder / "done").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    yield pa.RecordBatch.from_pydict({"number": [1]})


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def job(spark, tmp_path):
    """Starts a job of two tasks, which run until their folder has a file "done"."""
    started = []

    def start(name):
        folder = tmp_path / name
        folder.mkdir()
        frame = spark.range(0, 2, 1, 2).mapInArrow(partial(held, folder), "number long")
        started.append((folder, SparkJob(spark, frame, tag=f"test-{name}", description=name)))
        return folder

    yield start
    for folder, one in started:
        (folder / "done").touch()
        assert len(one.result(30, "a job of this test")) == 2


def test_a_stage_whose_tasks_run_is_not_taken_for_one_that_waits(spark, job):
    access = access_to(spark)
    for name in ("first", "second", "third"):  # the tracker is late in about every other stage
        folder = job(name)
        until(lambda folder=folder: len(list(folder.glob("runs-*"))) == 2)
        assert access.has_tasks(f"test-{name}")
        assert access.starving() == set()
        (folder / "done").touch()
        until(lambda name=name: not access.has_tasks(f"test-{name}"))


def test_a_stage_without_a_slot_waits_until_it_has_one(spark, job):
    access = access_to(spark)
    folder = job("holds")
    until(lambda: len(list(folder.glob("runs-*"))) == 2)
    later = job("waits")
    until(access.starving)
    assert len(access.starving()) == 1
    assert not access.has_tasks("test-waits")
    assert access.has_tasks("test-holds")
    (folder / "done").touch()
    until(lambda: len(list(later.glob("runs-*"))) == 2)
    assert access.has_tasks("test-waits")
    assert access.starving() == set()
