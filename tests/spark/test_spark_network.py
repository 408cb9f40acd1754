"""The coordinator's address: which port, which name, and what is said when executors cannot reach it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
from spark_models import estimator

from sparkdeep import ConfigError, CoordinatorUnreachableError
from sparkdeep.stages import coordinator

pytestmark = pytest.mark.spark


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_fit_goes_through_the_port_that_was_asked_for_and_gives_it_back(blobs):
    port = free_port()
    seen = []

    def look(_record):
        with socket.create_connection(("127.0.0.1", port), timeout=2):
            seen.append(port)

    estimator(coordinator_port=port, callbacks=[look], epochs=1).fit(blobs)
    assert seen
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))


def test_a_taken_port_is_refused_by_name(blobs):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"{port}.*coordinator_port="):
            estimator(coordinator_port=port).fit(blobs)


@pytest.mark.jobs
def test_an_address_that_executors_cannot_reach_names_the_settings(blobs, monkeypatch):
    # Executors of this host would come by the Unix socket; those of another one have only the address.
    monkeypatch.setattr(coordinator, "_listen_nearby", lambda: None)
    began = time.monotonic()
    with pytest.raises(CoordinatorUnreachableError, match=r"127\.0\.0\.9:\d+ .*coordinator_host=.*coordinator_port="):
        estimator(coordinator_host="127.0.0.9").fit(blobs)
    assert time.monotonic() - began < 200


def local_folders(spark):
    """Where workers keep shards and states."""

    def look(batches):
        for _ in batches:
            pass
        yield pa.RecordBatch.from_pydict({"path": os.environ["SPARK_LOCAL_DIRS"].split(",")})

    return [Path(row.path) for row in spark.range(0, 1, 1, 1).mapInArrow(look, "path string").collect()]


@pytest.mark.jobs
@pytest.mark.fault(rows=[14], phases="TR")
def test_ctrl_c_ends_the_fit_its_job_and_its_files(spark, blobs):
    folders = local_folders(spark)

    def ours():
        return {path for folder in folders for path in folder.rglob("sparkdeep-*")}

    before, during = ours(), []

    def tell(record):
        if not during:
            during.append(ours() - before)
            threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()  # as a terminal does, in a later round

    with pytest.raises(KeyboardInterrupt):
        estimator(epochs=100000, callbacks=[tell]).fit(blobs)
    tracker, deadline = spark.sparkContext.statusTracker(), time.monotonic() + 20
    while (jobs := list(tracker.getActiveJobsIds())) and time.monotonic() < deadline:
        time.sleep(0.1)  # the tracker hears of its end a little later
    assert jobs == []
    assert during[0], "shards were there"
    assert ours() == before
