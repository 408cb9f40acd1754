"""What the real petastorm wrote, read without petastorm: on this stack, and by the modern interpreter in its own process."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
from conftest import ROWS
from lts_rows import SCHEMA
from paths import ROOT
from read_natively import plain, rows_of

from sparkdeep import petastorm
from sparkdeep.errors import DataError

pytestmark = pytest.mark.lts

FIELDS = ("id", "small", "third", "price", "name", "x", "half", "trace", "image", "label")
# boxes has two dimensions, one of them variable: no type of Spark's says so.


def own_values(url):
    """The rows as petastorm's make_reader gives them: the oracle."""
    from petastorm import make_reader

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with make_reader(url, schema_fields=list(FIELDS), shuffle_row_groups=False, workers_count=1) as reader:
            # (asked twice: see test_petastorm_open.py)
            rows = [row for _ in range(2) for row in reader]
    values = [
        [plain(value.tolist() if hasattr(value, "tolist") else value) for value in (getattr(row, f) for f in FIELDS)]
        for row in rows
    ]
    return sorted(values, key=lambda row: row[0])


def rewritten(samples, folder, stored):
    """A copy of the dataset with another pickle as its schema."""
    from petastorm.etl.dataset_metadata import UNISCHEMA_KEY
    from petastorm.utils import add_to_dataset_metadata
    from pyarrow import parquet as pq

    shutil.copytree(samples.removeprefix("file://"), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pyarrow as pa

        opened = pq.ParquetDataset(str(folder), filesystem=pa.localfs, validate_schema=False)
        add_to_dataset_metadata(opened, UNISCHEMA_KEY, stored)
    return f"file://{folder}"


def renamed(stored, package):
    """A pickle of protocol 0, whose names are text, as the package under its older name wrote it."""
    for module in ("unischema", "codecs"):
        stored = stored.replace(f"cpetastorm.{module}\n".encode(), f"c{package}.{module}\n".encode())
    assert b"cpetastorm" not in stored
    return stored


@pytest.fixture(scope="module")
def variants(samples, tmp_path_factory):
    """Name -> URL of the dataset with the metadata of one age: protocols, and packages of before petastorm's name."""
    folder = tmp_path_factory.mktemp("variants")
    stored = {f"protocol {n}": pickle.dumps(SCHEMA, n) for n in (0, 2, 3, 5)}
    for package in ("av.ml.dataset_toolkit", "av.experimental.deepdrive.dataset_toolkit"):
        stored[package] = renamed(stored["protocol 0"], package)
    made = {name: rewritten(samples, folder / str(i), value) for i, (name, value) in enumerate(stored.items())}
    return {"as petastorm wrote it": samples, **made}


@pytest.fixture(scope="module")
def oracle(samples):
    values = own_values(samples)
    assert [row[0] for row in values] == list(range(ROWS))
    return values


def test_this_stack_reads_natively_what_petastorm_reads(spark, variants, oracle):
    for name, url in variants.items():
        assert rows_of(spark, url, list(FIELDS)) == oracle, name


def test_the_modern_stack_reads_what_petastorm_reads(variants, oracle):
    modern = ROOT / ".venv" / "bin" / "python"
    assert modern.exists(), "make test-lts makes .venv first"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SPARK", "PYSPARK", "PYTHON"))}
    environment = {
        **kept,
        "PYTHONPATH": str(ROOT),
        "PYSPARK_PYTHON": str(modern),
        "PYSPARK_DRIVER_PYTHON": str(modern),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_CONF_DIR": str(ROOT / "conf"),
    }
    script = str(Path(__file__).with_name("read_natively.py"))
    done = subprocess.run(
        [str(modern), script, ",".join(FIELDS), *variants.values()],
        env=environment, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert int(found["versions"]["pyspark"].split(".")[0]) >= 4
    assert int(found["versions"]["pyarrow"].split(".")[0]) > 14
    assert not found["versions"]["petastorm"]
    assert {*found["fields"], "image"} == set(FIELDS)
    expected = [[row[FIELDS.index(name)] for name in found["fields"]] for row in oracle]
    for name, rows in zip(variants, found["rows"], strict=True):
        assert rows == expected, name


def test_both_ways_give_the_same_columns(spark, samples):
    fields = [name for name in FIELDS if name != "name"]
    through = petastorm.open(samples, fields=fields).dataframe(spark, 2)
    native = dict(petastorm.read(spark, samples, fields=fields).dtypes)
    assert native["price"] == "decimal(10,2)"
    assert dict(through.dtypes) == native | {"price": "double"}


def test_what_the_native_reader_refuses_petastorm_can_still_read(spark, samples):
    with pytest.raises(DataError, match="boxes"):
        petastorm.read(spark, samples)
    assert petastorm.open(samples, fields=["boxes"]).dataframe(spark, 2).count() == ROWS


def test_a_poisoned_schema_is_refused_by_both(spark, samples, tmp_path):
    class Poison:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    url = rewritten(samples, tmp_path / "poisoned", pickle.dumps(Poison()))
    with pytest.raises(DataError, match=r"posix|os"):
        petastorm.read(spark, url)
    with pytest.raises(DataError, match="forbidden"):  # petastorm's own restricted unpickler
        petastorm.open(url).dataframe(spark, 2)
    assert not (tmp_path / "it ran").exists()
