"""A Spark Connect server of this process, and a client of it. Classic sessions cannot live in the same process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

_HERE = Path(__file__).resolve().parent
_NEIGHBOURS = [str(_HERE), str(_HERE.parent / "spark"), str(_HERE.parent / "jobs"), str(_HERE.parents[1])]
os.environ["PYTHONPATH"] = os.pathsep.join([*_NEIGHBOURS, *filter(None, [os.environ.get("PYTHONPATH", "")])])
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
# A JVM that lives for minutes: compiling well costs it more than it gains.
os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
sys.path[1:1] = [str(_HERE.parent / "jobs"), str(_HERE.parent / "spark")]

# The server's own settings: a client may not set them.
_SERVER = {
    "spark.ui.enabled": "false",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.sql.shuffle.partitions": "2",
    "spark.python.daemon.module": "sparkdeep.spark.daemon",
    "spark.connect.grpc.binding.address": "127.0.0.1",
}


@pytest.fixture(scope="session")
def spark():
    from pyspark.sql import SparkSession

    options = " ".join(f"--conf {name}={value}" for name, value in _SERVER.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_SUBMIT_ARGS", f"{options} pyspark-shell")
        patch.setenv("SPARK_TESTING", "1")  # PySpark then takes any free port, for servers beside each other
        session = SparkSession.builder.remote("local[2]").getOrCreate()
    yield session
    session.stop()


@pytest.fixture(scope="session")
def blobs(spark):
    """200 rows of three separable classes: pixels array<double> of 8, label bigint, id int."""
    from transport_models import blob_rows

    return spark.createDataFrame(blob_rows(200), "id int, pixels array<double>, label bigint").cache()
