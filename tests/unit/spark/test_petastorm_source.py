"""What `sparkdeep.petastorm.open` refuses before petastorm or Spark is touched, and what it says without petastorm."""

from __future__ import annotations

import sys

import pytest

from sparkdeep import petastorm
from sparkdeep.data.petastorm.reading import inspect
from sparkdeep.errors import ConfigError


def forget(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "petastorm":
            monkeypatch.delitem(sys.modules, name)


def test_without_petastorm_the_way_out_is_named(monkeypatch):
    forget(monkeypatch)
    monkeypatch.setitem(sys.modules, "petastorm", None)
    # (None in sys.modules stands for a package that is not there)
    with pytest.raises(ConfigError, match=r"petastorm is not installed.*sparkdeep.petastorm.read\(spark, url\)"):
        inspect(petastorm.open("/data/x").dataset)


def test_a_petastorm_that_does_not_fit_pyarrow_is_told_from_one_that_is_not_there(monkeypatch, tmp_path):
    forget(monkeypatch)
    (tmp_path / "petastorm").mkdir()
    (tmp_path / "petastorm" / "__init__.py").write_text("from pyarrow import no_such_filesystem_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be imported with pyarrow .*pyarrow 14 or older.*petastorm.read"):
        inspect(petastorm.open("/data/x").dataset)
    forget(monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reader": "make_torch_reader"}, "reader='make_torch_reader': must be one of"),
        ({"fields": "x"}, "fields='x': give a list"),
        ({"fields": []}, "give a list of names"),
        ({"timeout_s": 0}, "timeout_s=0: must be a number of seconds above zero"),
        ({"timeout_s": True}, "timeout_s=True"),
        ({"shard_count": 2}, "shard_count=2 is set by sparkdeep: row groups are dealt by num_workers"),
        ({"shuffle_row_groups": True}, "the estimator shuffles, by its seed"),
        ({"schema_fields": ["x"]}, "give fields="),
    ],
)
def test_settings_that_cannot_be_meant(arguments, message):
    with pytest.raises(ConfigError, match=message):
        petastorm.open("file:///data/x", **arguments)


def test_urls_have_the_scheme_that_petastorm_demands():
    assert petastorm.open("/data/x/").dataset.url == "file:///data/x"
    assert petastorm.open("hdfs://name/data/x").dataset.url == "hdfs://name/data/x"
    assert petastorm.open(["/a.parquet", "file:///b.parquet"]).dataset.url == ("file:///a.parquet", "file:///b.parquet")
    with pytest.raises(ConfigError, match="give a folder"):
        petastorm.open([])
