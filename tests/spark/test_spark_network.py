"""The coordinator's address: which port, which name, and what is said when executors cannot reach it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

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


SCRIPT = """
    import os, sys, time
    from pyspark.sql import SparkSession
    from spark_models import blob_rows, estimator
    spark = (SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
             .config("spark.local.dir", sys.argv[1]).config("spark.driver.host", "127.0.0.1").getOrCreate())
    rows = spark.createDataFrame(blob_rows(200), "id int, pixels array<double>, label bigint")
    told = []
    def tell(record):
        if not told:
            told.append(print("TRAINING", flush=True))
    try:
        estimator(epochs=100000, callbacks=[tell]).fit(rows)
    except KeyboardInterrupt:
        deadline = time.monotonic() + 20
        while (jobs := list(spark.sparkContext.statusTracker().getActiveJobsIds())) and time.monotonic() < deadline:
            time.sleep(0.1)  # the tracker hears of its end a little later
        left = [f for d, _, _ in os.walk(sys.argv[1]) for f in [d] if "sparkdeep-" in d]
        print("INTERRUPTED", jobs, left, flush=True)
"""


@pytest.mark.jobs
@pytest.mark.fault(rows=[14], phases="TR")
def test_ctrl_c_ends_the_fit_its_job_and_its_files(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])}
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        line = next(text for text in child.stdout if "TRAINING" in text)
        assert line
        time.sleep(0.5)
        assert child.pid > 1
        child.send_signal(signal.SIGINT)
        rest, _ = child.communicate(timeout=120)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    assert "INTERRUPTED [] []" in rest
