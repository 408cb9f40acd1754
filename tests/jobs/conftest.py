"""One session for the tests of this tier; what executors need to import is set before the JVM starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import BENCHMARKS, JOBS, for_executors

for_executors(Path(__file__).parent, JOBS, BENCHMARKS)

# Before the JVM starts: workers are forked with torch imported, and the UI answers on a port that is free.
_SUBMIT = (
    "--conf spark.python.daemon.module=sparkdeep.spark.daemon --conf spark.ui.port=0 "
    "--conf spark.ui.showConsoleProgress=false pyspark-shell"
)


@pytest.fixture(scope="session")
def spark():
    """With a UI, by whose REST interface a test sees what it shows of a fit."""
    from pyspark.sql import SparkSession

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_SUBMIT_ARGS", _SUBMIT)
        session = (
            SparkSession.builder.master("local[2]")
            .appName("sparkdeep-jobs")
            .config("spark.driver.bindAddress", "127.0.0.1")
            .config("spark.driver.host", "127.0.0.1")
            .config("spark.sql.shuffle.partitions", "2")
            .getOrCreate()
        )
    yield session
    session.stop()
