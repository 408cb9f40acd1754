"""What a fit leaves behind, whether it ends well or not: nothing."""

from __future__ import annotations

import json
import socket
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from spark_models import Trap, estimator

from sparkdeep.data.scratch import owner_of_this_process
from sparkdeep.errors import DataError, NonFiniteError, UserCodeError

pytestmark = pytest.mark.spark


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def answers(port):
    with socket.socket() as sock:
        sock.settimeout(1.0)
        return sock.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def folders(spark):
    """The executor's local directories, as its Python workers see them."""

    def ask(batches):
        import os

        for _ in batches:
            pass
        yield pa.RecordBatch.from_pydict({"folder": [os.environ["SPARK_LOCAL_DIRS"]]})

    found = spark.range(0, 1, 1, 1).mapInArrow(ask, "folder string").collect()
    return [Path(folder) for row in found for folder in row.folder.split(",")]


def left(spark, folders, port):
    """Everything that a fit should have let go of."""
    context = spark.sparkContext._jsc.sc()
    tracker = spark.sparkContext.statusTracker()
    return {
        "folders": {str(path) for folder in folders for path in folder.glob("sparkdeep-*")},
        "persisted": {info.id() for info in context.getRDDStorageInfo()},
        "jobs": list(tracker.getActiveJobsIds()),
        "port": answers(port),
    }


def settles(look, expected, within_s=10.0):
    deadline = time.monotonic() + within_s
    while (seen := look()) != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    return seen


@pytest.fixture(scope="module")
def frame(spark):
    rows = [([float(i)] + [0.0] * 7, 0) for i in range(200)]
    return spark.createDataFrame(rows, "pixels array<double>, label bigint")


def stop_at_once(record):
    raise KeyError("the callback's own error")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, None),
        ({"model": partial(Trap, 150.0)}, UserCodeError),
        ({"optimizer": partial(torch.optim.SGD, lr=1e30), "epochs": 3}, NonFiniteError),
        ({"callbacks": [stop_at_once]}, KeyError),
        ({"feature_cols": ["label", "gap"]}, DataError),
        ({"model": partial(torch.nn.Linear, 5, 3)}, UserCodeError),
        ({"decode": {"raw": lambda data: 1 / 0}, "feature_cols": "raw"}, UserCodeError),
    ],
    ids=["well", "model", "nan", "callback", "ingest-fault", "rehearsal", "ingest-raises"],
)
def test_no_folder_no_persisted_rows_no_job_and_no_port_are_left(spark, folders, frame, options, error):
    from pyspark.sql import functions as F

    port = free_port()
    # Spark tells of a job's end a moment later: what an earlier test ran must not stand in `before`.
    assert settles(lambda: left(spark, folders, port)["jobs"], []) == []
    before = left(spark, folders, port)
    assert not before["port"]
    seen = []

    def look_while_open(record):
        seen.append(left(spark, folders, port))

    used = frame.withColumn("gap", F.when(F.col("pixels")[0] > 5, 1.0)).withColumn("raw", F.lit(b"x"))
    callbacks = [look_while_open, *options.get("callbacks", [])]
    fit = estimator(
        **{
            "coordinator_port": port,
            **options,
            "callbacks": callbacks,
            "optimizer": options.get("optimizer", partial(torch.optim.SGD, lr=1e-9)),
        }
    )
    if error is None:
        fit.fit(used)
    else:
        with pytest.raises(error):
            fit.fit(used)
    if error in {None, KeyError}:  # the looking itself sees what there is to see
        assert seen[0]["folders"] > before["folders"]
        assert seen[0]["persisted"] > before["persisted"]
        assert seen[0]["port"]
    assert settles(lambda: left(spark, folders, port), before) == before


def test_shards_on_shared_storage_are_removed_too(frame, tmp_path):
    seen = []
    options = {"shard_dir": str(tmp_path), "callbacks": [lambda record: seen.extend(tmp_path.iterdir()) or False]}
    estimator(optimizer=partial(torch.optim.SGD, lr=1e-9), **options).fit(frame)
    assert seen
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_executor_left_is_swept_by_the_next_fit_and_what_a_live_one_owns_is_not(folders, frame):
    folder = folders[0]
    alive = owner_of_this_process().to_json()
    dead = {**alive, "pid": 2**22 - 1}
    for name, owner in (("sparkdeep-dead", dead), ("sparkdeep-alive", alive)):
        (folder / name).mkdir(mode=0o700)
        (folder / name / "owner.json").write_text(json.dumps(owner))
        (folder / name / "shard").write_text("rows")
    try:
        estimator(optimizer=partial(torch.optim.SGD, lr=1e-9)).fit(frame)
        assert not (folder / "sparkdeep-dead").exists()
        assert (folder / "sparkdeep-alive" / "shard").exists()
    finally:
        for path in (folder / "sparkdeep-alive").iterdir():
            path.unlink()
        (folder / "sparkdeep-alive").rmdir()


@pytest.mark.fault(rows=[15], phases="TR")
def test_the_callers_job_group_and_description_stay_as_they_were(spark, frame):
    context = spark.sparkContext
    names = [
        "spark.jobGroup.id",
        "spark.job.description",
        "spark.job.interruptOnCancel",
        "spark.job.tags",
        "spark.scheduler.pool",
    ]
    context.setJobGroup("of the caller", "what the caller does", interruptOnCancel=True)
    try:
        before = [context.getLocalProperty(name) for name in names]
        assert before[:2] == ["of the caller", "what the caller does"]
        estimator(optimizer=partial(torch.optim.SGD, lr=1e-9)).fit(frame)
        assert [context.getLocalProperty(name) for name in names] == before
        assert len(context.getJobTags()) == 0
        assert len(context.statusTracker().getJobIdsForGroup("of the caller")) > 1
    finally:
        for name in names:
            context.setLocalProperty(name, None)
