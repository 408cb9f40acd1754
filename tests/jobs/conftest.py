"""One session for the tests of this tier; what executors need to import is set before the JVM starts."""

from __future__ import annotations

from pathlib import Path

from paths import BENCHMARKS, JOBS, for_executors

for_executors(Path(__file__).parent, JOBS, BENCHMARKS)
