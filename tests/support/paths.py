"""Where things of the checkout lie, for every test."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
TESTS: Final = ROOT / "tests"
SUPPORT: Final = TESTS / "support"
JOBS: Final = ROOT / "jobs"
BENCHMARKS: Final = ROOT / "benchmarks"
PACKAGE: Final = ROOT / "sparkdeep"


def for_executors(*folders: Path) -> None:
    """Have Python workers import from `folders` and the checkout; to be called before the JVM starts, which hands it on."""
    path = [*map(str, folders), str(SUPPORT), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    # A JVM that lives for minutes: compiling well costs it more than it gains.
    os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
