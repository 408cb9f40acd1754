"""Reads datasets by sparkdeep.petastorm.read and prints their rows as JSON; run by the interpreter of the modern stack.

Arguments: names of fields, by commas; then one URL or more.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

from pyspark.sql import SparkSession

from sparkdeep import petastorm


def plain(value):
    """Exact in JSON: numbers as they are, decimals as text."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value if isinstance(value, int | float | str | None) else str(value)


def rows_of(spark, url, fields):
    frame = petastorm.read(spark, url, fields=fields)
    return sorted(([plain(value) for value in row] for row in frame.collect()), key=lambda row: row[0])


def main():
    fields, *urls = sys.argv[1:]
    # The modern environment need not have OpenCV: images are compared where it has.
    names = [name for name in fields.split(",") if name != "image" or find_spec("cv2") is not None]
    spark = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .getOrCreate()
    )
    import pyarrow as pa
    import pyspark

    versions = {"pyspark": pyspark.__version__, "pyarrow": pa.__version__, "petastorm": "petastorm" in sys.modules}
    print(json.dumps({"versions": versions, "fields": names, "rows": [rows_of(spark, url, names) for url in urls]}))
    spark.stop()


if __name__ == "__main__":
    main()
