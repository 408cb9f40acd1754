"""What executors need to import the models of these tests; set before the JVM starts, which hands it on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

_HERE = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(_HERE), str(_HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH", "")])]
)
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
# A JVM that lives for minutes: compiling well costs it more than it gains.
os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
# Offline, so that nothing that these packages do by themselves reaches for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def executors_of_another_backend():
    """Executors inherit a Keras backend that is not installed; the driver chooses its own, later."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    yield
    os.environ.pop("KERAS_BACKEND", None)


@pytest.fixture(scope="session")
def spark(executors_of_another_backend, spark):
    os.environ["KERAS_BACKEND"] = "torch"
    return spark
