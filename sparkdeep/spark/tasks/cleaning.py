"""What runs on executors after a fit, to remove the run's folders."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import pyarrow as pa
from pyspark.sql import SparkSession

from sparkdeep.data.scratch import release
from sparkdeep.spark.session.access import access_to
from sparkdeep.spark.session.jobs import SparkJob
from sparkdeep.spark.session.task import local_dirs
from sparkdeep.storage.opening import open_store
from sparkdeep.storage.store import run_folder

__all__ = ["clean_executors", "clean_task"]

# Of several executors each gets a clean-up task, as one stays this long in its slot.
_SPREAD_S: Final = 0.2
_RELEASE_TIMEOUT_S: Final = 5.0
_CLEAN_ATTEMPTS: Final = 3
_CLEAN_TIMEOUT_S: Final = 30.0
_LOG: Final = logging.getLogger("sparkdeep")


def clean_task(
    run: str, shard_dir: str | None, exchange: str | None, stay_s: float, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Remove what a run left on this executor, and its shared folders.

    Yields one row: which executor this is, by its local directories.
    """
    for _ in batches:
        pass  # a Python worker whose input is not read to its end is not used again, and the next one imports torch anew
    folders = local_dirs()
    deadline = time.monotonic() + _RELEASE_TIMEOUT_S
    for folder in [*folders, *([shard_dir] if shard_dir is not None else [])]:
        for path in Path(folder).glob(f"sparkdeep-{run}*"):
            release(path)
            while path.exists() and time.monotonic() < deadline:  # a task of a failed stage may still be writing there
                time.sleep(0.1)
                release(path)
    if exchange is not None:
        with contextlib.suppress(OSError):  # another task of this clean-up may be deleting it
            open_store(exchange).delete(run_folder(run))
    time.sleep(stay_s)
    yield pa.RecordBatch.from_pydict({"executor": pa.array([",".join(folders)], pa.string())})


def clean_executors(
    spark: SparkSession,
    run: str,
    shard_dir: str | None,
    *,
    exchange: str | None = None,
    num_workers: int = 1,
) -> bool:
    """Remove a run's folders on every executor that is up; returns whether all of them were reached.

    A folder of an executor that is gone lies in its Spark local directory, and is swept by the next fit on that host.

    Args:
        spark: the session.
        run: the run's id.
        shard_dir: the shared folder of shards, or None.
        exchange: that of updates, or None.
        num_workers: replicas; twice as many tasks run where the session cannot tell its slots (Spark Connect).
    """
    access = access_to(spark)
    reached: set[str] = set()
    for attempt in range(_CLEAN_ATTEMPTS):
        try:  # around all of it, as a session that was stopped answers nothing
            alone = access.executors() == 1
            tasks = 1 if alone else max(1, access.slots(None) or 2 * num_workers)
            task = partial(clean_task, run, shard_dir, exchange, 0.0 if alone else _SPREAD_S)
            frame = spark.range(0, tasks, 1, tasks).mapInArrow(task, "executor string")
            job = SparkJob(spark, frame, tag=f"sparkdeep-{run}-clean-{attempt}", description="sparkdeep fit: clean up")
            reached |= {row["executor"] for row in job.result(_CLEAN_TIMEOUT_S, "cleaning up")}
            executors = access.executors()
        except Exception as error:  # noqa: BLE001 (a failed clean-up must not hide the fit's own outcome; it is logged)
            _LOG.warning("cleaning up failed: %s", error)
            return False
        if executors is None or len(reached) >= executors:
            return True
    return False
