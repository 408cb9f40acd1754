"""What docstrings and comments of the package name: modules and names that are there."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator

import pytest
from paths import PACKAGE

FILES = sorted(PACKAGE.rglob("*.py"))
# Heads of dotted names that stand for something of the user's or of another package: `model.history`, `time.monotonic`.
OTHERS = {
    "copy",
    "random",
    "time",
    "torch",
    "nn",
    "numpy",
    "mlflow",
    "pyarrow",
    "petastorm",
    "pyspark",
    "spark",
    "sparkdeep",
}
OTHERS |= {"Tensor", "Metric", "LightningModule", "Pipeline", "PipelineModel", "CrossValidator", "CrossValidatorModel"}
OTHERS |= {"model", "estimator", "optimizer", "job", "ema", "frame", "record", "schema", "features", "label", "report"}


def texts(source: str) -> Iterator[str]:
    """Docstrings, strings that stand as docstrings of fields, and comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def names_in(source: str) -> set[str]:
    """Every name that a file defines, imports, takes as an argument or uses."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                found.add(name)
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.alias(name=name, asname=other):
                found.add(other or name.rpartition(".")[2])
    return found


SOURCES = {path: path.read_text(encoding="utf-8") for path in FILES}
NAMES = {path: names_in(source) for path, source in SOURCES.items()}
OWNERS: dict[str, set[str]] = {}  # a file's name without suffix, or a class -> names in the files of that name or class
for file, there in NAMES.items():
    classes = {node.name for node in ast.walk(ast.parse(SOURCES[file])) if isinstance(node, ast.ClassDef)}
    for owner in {file.stem, *classes}:
        OWNERS.setdefault(owner, set()).update(there)


def unresolved(source: str) -> set[str]:
    """`a.b` in backticks where a is neither a module or class of ours that has b, nor a name of this file or of others."""
    own = names_in(source)
    named = {
        name for text in texts(source) for name in re.findall(r"`([A-Za-z]\w*\.\w+)(?:\.\w+)*(?:\([^`]*\))?`", text)
    }
    found = set()
    for name in named:
        head, _, tail = name.partition(".")
        known = tail in OWNERS[head] if head in OWNERS else head in own
        if not known and tail not in own and head not in OTHERS and tail != "py":
            found.add(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_modules_and_names_that_it_mentions_are_there(path):
    assert not unresolved(SOURCES[path])


def test_the_check_sees_what_has_moved():
    assert unresolved('"""See `nowhere.at_all`."""') == {"nowhere.at_all"}
    assert unresolved('"""See `state_dicts.pack_tensor`."""') == {"state_dicts.pack_tensor"}
    assert not unresolved('"""See `state_dicts.pack_tensors`, `model.history` and `x.y`."""\nx = 1')
