"""What executors need to import the models of these tests; set before the JVM starts, which hands it on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from paths import for_executors

for_executors(Path(__file__).parent)


@pytest.fixture(scope="session")
def warm_workers():
    """Only for the session of these tests: other programs that they start have Spark's own daemon."""
    before = os.environ.get("PYSPARK_SUBMIT_ARGS")
    os.environ["PYSPARK_SUBMIT_ARGS"] = "--conf spark.python.daemon.module=sparkdeep.spark.daemon pyspark-shell"
    yield
    if before is None:
        del os.environ["PYSPARK_SUBMIT_ARGS"]
    else:
        os.environ["PYSPARK_SUBMIT_ARGS"] = before


@pytest.fixture(scope="session")
def spark(warm_workers, spark):
    return spark


@pytest.fixture(scope="session")
def blobs(spark):
    """200 rows of three separable classes: pixels array<double> of 8, label bigint, id int."""
    from spark_models import blob_rows

    return spark.createDataFrame(blob_rows(200), "id int, pixels array<double>, label bigint").cache()


@pytest.fixture(scope="session")
def plain(blobs):
    """What a fit of `blobs` with the short settings gives; to be looked at, and left as it is."""
    from spark_models import estimator

    return estimator().fit(blobs)


@pytest.fixture(scope="session")
def with_state(blobs):
    """What a fit with `spark_models.WITH_STATE` gives, whose rounds depend on random streams, buffers and Adam's moments."""
    from spark_models import WITH_STATE, estimator

    return estimator(worker_process="reuse", rounds_per_stage="auto", **WITH_STATE).fit(blobs)
