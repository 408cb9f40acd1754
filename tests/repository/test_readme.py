"""README and docs/: short, true of the checkout, and with code that runs."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys

import pytest
from paths import ROOT, TESTS
from test_layers import PURPOSES, floors

from sparkdeep import TorchEstimator
from sparkdeep.settings.run import LocalSettings, RunSettings

# Before the session starts: executors run this interpreter.
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
TEXTS = {"README.md": README, **PAGES}
NAV = re.findall(
    r"^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE
)
MAX_LINES = 150
_FOLDERS = "sparkdeep|jobs|benchmarks|conf|tests|docs"


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def prose(text):
    """Without what stands in fenced blocks, where `#` and `[a](b)` mean other things."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(text):
    """Targets of links and pictures, those on the network left out."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(text)) + re.findall(r'<img src="([^"]+)"', text)
    return [target for target in found if not re.match(r"\w+:", target)]


def broken_links(name, text, texts):
    """Links of a page to files or headings that are not there, or, within docs/, out of docs/."""
    broken = []
    for target in links(text):
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        try:
            to = path.resolve().relative_to(ROOT).as_posix()
        except ValueError:
            to = ""
        leaves_site = name.startswith("docs/") and not to.startswith("docs/")
        if leaves_site or not path.is_file() or (anchor and anchor not in anchors(texts.get(to, ""))):
            broken.append(target)
    return broken


def named_paths(text):
    """Files and folders of the checkout that a text names."""
    found = re.findall(rf"(?<![\w/.])((?:{_FOLDERS})/(?:[\w.-]+/)*(?:[\w-]+\.\w+)?)", text)
    return {path for path in found if "." in path or path.endswith("/")}


def room_rows(text):
    return re.findall(r"^\| (\d+) \| `(\w+)` \| (.+) \|$", text, flags=re.MULTILINE)


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
    assert documented_arguments(PAGES["docs/reference/settings.md"]) == accepted_arguments()


def test_the_rooms_are_those_of_the_package():
    found = floors()
    assert room_rows(README) == [(str(found[room]), room, purpose) for room, purpose in PURPOSES.items()]


@pytest.mark.parametrize("name", TEXTS)
def test_paths_that_the_text_names_exist(name):
    missing = {path for path in named_paths(TEXTS[name]) if not (ROOT / path).exists()}
    assert not missing


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings(name):
    assert not broken_links(name, TEXTS[name], TEXTS)


def test_every_page_is_in_the_table_of_contents_once():
    assert sorted(NAV) == [name.removeprefix("docs/") for name in PAGES]


def test_every_page_of_the_guide_is_named_in_the_readme():
    assert {name for name in PAGES if name.startswith("docs/guide/")} <= set(links(README))


def test_tests_that_the_design_names_exist():
    named = {
        name
        for group in re.findall(r"\[((?:\w+/)?test_[\w/, ]+)\]", PAGES["docs/design.md"])
        for name in group.split(", ")
    }
    assert named
    there = {path.relative_to(TESTS).with_suffix("").as_posix() for path in TESTS.rglob("test_*.py")}
    assert not {name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in there)}


def test_it_stays_short_enough_to_read():
    assert len(README.splitlines()) <= MAX_LINES, "the rest is for docs/"


def test_the_path_reader_sees_files_and_folders():
    text = "`jobs/` has jobs/train.py; `sparkdeep/data/shards.py`, data/jobs/x.py; docs/results/"
    assert named_paths(text) == {"docs/results/", "jobs/", "jobs/train.py", "sparkdeep/data/shards.py"}


def test_the_link_reader_sees_files_and_headings():
    text = '[a](docs/design.md#words) [b](docs/design.md#word) [c](no.md) [d](https://x.y/z) [e](#here) <img src="no.png">\n# Here\n'
    assert broken_links("README.md", text, {**TEXTS, "README.md": text}) == ["docs/design.md#word", "no.md", "no.png"]
    assert broken_links("docs/design.md", "[out](../README.md)", TEXTS) == ["../README.md"]


@pytest.mark.spark
def test_code_blocks_run_in_order_and_the_first_reaches_97_percent(spark, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    # What a notebook or script defines lives in __main__, and travels to executors by value.
    namespace = {"__name__": "__main__"}
    in_order = ["README.md", *(f"docs/{name}" for name in NAV if name.startswith("guide/"))]
    (_, first), *others = [(name, block) for name in in_order for block in blocks(TEXTS[name])]
    exec(compile(first, "README.md", "exec"), namespace)
    assert namespace["accuracy"] >= 0.97
    assert namespace["spark"] is spark
    dataset = (ROOT / "tests/support/petastorm_data/folders").as_uri()
    for name, block in others:
        exec(compile(block.replace("file:///data/images", dataset), name, "exec"), namespace)
    assert len(others) == 5
    assert (tmp_path / "runs/readme/price.pt2").is_file()
    assert namespace["in_sql"].count() == 400
    assert namespace["images"].count() > 0
    assert (tmp_path / "runs/readme/digits").is_dir()
    assert namespace["prices"].history[-1].loss < namespace["prices"].history[0].loss
