from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys

import pytest
from paths import ROOT

from sparkdeep import TorchEstimator
from sparkdeep.settings.local import LocalSettings
from sparkdeep.settings.run import RunSettings

# Before the session starts: executors run this interpreter.
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def section(text, title):
    match = re.search(rf"^#+ {title}\n(.*?)(?=^#+ |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert match, f"README.md has no section {title!r}"
    return match[1]


def documented_arguments(text):
    """Names in backticks in the first column of the table."""
    return {
        name for row in re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }


def accepted_arguments():
    signature = inspect.signature(TorchEstimator.__init__).parameters.values()
    fields = {f.name for cls in (LocalSettings, RunSettings) for f in dataclasses.fields(cls)}
    return {p.name for p in signature if p.kind == p.KEYWORD_ONLY} | fields


def test_every_argument_of_the_estimator_is_in_the_table_and_no_other():
    assert documented_arguments(section(README, "Every argument")) == accepted_arguments()


def test_paths_that_the_text_names_exist():
    named = set(re.findall(r"\b((?:jobs|benchmarks|conf|tests)/\w+\.(?:py|toml))\b", README))
    assert named
    assert not {path for path in named if not (ROOT / path).is_file()}


def test_it_stays_short_enough_to_read():
    # The table of arguments grows with the package; the rest is what is read from top to bottom.
    read = README.replace(section(README, "Every argument"), "")
    assert len(read.splitlines()) <= 460


@pytest.mark.spark
def test_code_blocks_run_in_order_and_the_first_reaches_97_percent(spark, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    # What a notebook or script defines lives in __main__, and travels to executors by value.
    namespace = {"__name__": "__main__"}
    first, *others = blocks(README)
    exec(compile(first, "README.md, block 1", "exec"), namespace)
    assert namespace["accuracy"] >= 0.97
    assert namespace["spark"] is spark
    dataset = (ROOT / "tests/support/petastorm_data/folders").as_uri()
    for number, block in enumerate(others, start=2):
        exec(compile(block.replace("file:///data/images", dataset), f"README.md, block {number}", "exec"), namespace)
    assert len(others) == 5
    assert (tmp_path / "runs/readme/price.pt2").is_file()
    assert namespace["in_sql"].count() == 400
    assert namespace["images"].count() > 0
    assert (tmp_path / "runs/readme/digits").is_dir()
    assert namespace["prices"].history[-1].loss < namespace["prices"].history[0].loss
