"""One session for this tier, and datasets that petastorm itself wrote; executors import from the repository."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
)
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
# A JVM that lives for minutes: compiling well costs it more than it gains.
os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _name in ("petastorm.spark", "petastorm.pytorch", "petastorm.etl.dataset_metadata", "petastorm.transform"):
        importlib.import_module(_name)

GROUPS = 5
ROWS = 60


@pytest.fixture(autouse=True)
def _petastorm_is_old():
    """It calls what pyarrow 14 and Python 3.11 announce to remove; a warning of ours is still an error."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=r"petastorm|pyarrow|pyspark")
        yield


@pytest.fixture(scope="session")
def samples(spark, tmp_path_factory):
    """URL of `ROWS` rows of every kind of field that can be trained on, in `GROUPS` files of one row group."""
    from lts_rows import write_samples

    folder = tmp_path_factory.mktemp("petastorm") / "samples"
    write_samples(spark, f"file://{folder}", rows=ROWS, files=GROUPS)
    return f"file://{folder}"


@pytest.fixture(scope="session")
def plain(spark, tmp_path_factory):
    """URL of plain Parquet: `ROWS` rows in `GROUPS` files, with nulls in a column of integers."""
    folder = tmp_path_factory.mktemp("parquet") / "plain"
    spark.range(0, ROWS, 1, GROUPS).selectExpr(
        "id",
        "if(id % 4 = 0, null, cast(id as int)) AS holes",
        "cast(array(id / 10, id % 3, id % 5) as array<float>) AS x",
        "id % 3 = 0 AS third",
        "concat('row ', id) AS name",
        "id % 3 AS label",
    ).write.parquet(str(folder))
    return f"file://{folder}"
