"""What executors need to import the models of these tests; set before the JVM starts, which hands it on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from paths import for_executors

for_executors(Path(__file__).parent)
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
