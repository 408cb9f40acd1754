"""Spark's Python daemon with torch imported: a worker that a failing test cost is replaced without importing it again."""

from __future__ import annotations

from pyspark.daemon import manager

import sparkdeep.spark.scoring
import sparkdeep.spark.tasks  # noqa: F401 (imported for the workers that are forked from here)

if __name__ == "__main__":
    manager()
