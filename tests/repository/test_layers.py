"""Which room may import which, and what stands where: the one table, and the tests that hold the code to it."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import PACKAGE

GROUND = "errors seams versions checks"  # files beside __init__.py that every room may use
ROOMS = {  # room: the rooms below it that it may import
    "tensors": "",
    "storage": "",
    "tracking": "",
    "protocol": "tensors storage",
    "data": "storage",
    "optim": "tensors tracking protocol",
    "models": "tensors storage data",
    "settings": "tensors optim",
    "replica": "tensors storage protocol data optim models settings",
    "rounds": "tensors storage tracking protocol data optim models settings",
    "stages": "tensors protocol optim settings rounds",
    "spark": "tensors storage tracking protocol data optim models settings replica rounds stages algorithms",
    "testing": "storage protocol data settings replica stages",
    "algorithms": "optim settings",  # the public files are rooms of one file
    "petastorm": "spark",
    "cli": "stages spark",
    "pyfunc": "spark",
    "report": "tracking",
    "keras_network": "models",
    "__main__": "cli",
}
GROUND_ROOMS = {"errors": "", "seams": "", "versions": "", "checks": "errors"}
PURPOSES = {  # as README's table and each room's __init__.py have them; the order is README's
    "tensors": "a module as one flat vector, vectors as bytes, the exact mean",
    "storage": "folders of bytes on disk, S3 or Arrow; checkpoints that a crash leaves whole",
    "tracking": "what a run tells: records, callbacks, bar, report, MLflow, TensorBoard",
    "protocol": "everything that crosses between driver and replica, as values and as frames",
    "data": "Arrow columns to shards to batches, without Spark; `data/petastorm`",
    "optim": "the algebra of a round: its length, how updates become one, the outer step",
    "models": "the user's network and callables: built, adapted, rehearsed, scored, saved",
    "settings": "what may be asked for, and what cannot be meant together",
    "replica": "all that runs where a replica runs: local steps, its end of a stage or job",
    "rounds": "the run on the driver: what is due, what it starts from, when it is over",
    "stages": "the driver's end: open stages by sockets, or a job a round",
    "spark": "the one door to pyspark",
}
TOP_FILES = {*(f"{name}.py" for name in GROUND.split()), "algorithms.py", "petastorm.py", "cli.py"}
TOP_FILES |= {"__init__.py", "__main__.py", "py.typed"}
SPARK_FOLDERS = {"session", "ingest", "model", "tasks", "fit", "doctor", "job"}
SPARK_FILES = {"__init__.py", "daemon.py"}
NAMED_IN_FILES = {  # modules that models, jobs and pickles on disk name: they may stand where they are named
    "": {"pyfunc.py", "report.py", "keras_network.py"},
    "spark": {"estimator.py", "pyfunc.py"},
}
LAZY = {"tracking", "spark/model"}  # their public names are imported when they are first used
FOLDERS = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)


def room(module: str) -> str:
    return module.split(".")[1]


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of ours that a tree imports, in functions too; what only a type checker reads is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("sparkdeep."))
        elif isinstance(node, ast.ImportFrom) and node.module == "sparkdeep":
            files = {path.stem for path in PACKAGE.iterdir()} - {
                "__init__"
            }  # what is no file is a public name of the package
            yield from (f"sparkdeep.{alias.name}" for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparkdeep."):
            yield node.module or ""
        yield from imports(node)


def broken(files: dict[str, str]) -> list[str]:
    """ "module -> module" for each import that the table does not allow."""
    allowed = {name: {*below.split(), *GROUND.split(), name} for name, below in ROOMS.items()}
    allowed |= {name: {*below.split(), name} for name, below in GROUND_ROOMS.items()}
    return sorted(
        f"{module} -> {target}"
        for module, text in files.items()
        for target in set(imports(ast.parse(text)))
        if room(target) not in allowed.get(room(module), set())
    )


def floors() -> dict[str, int]:
    """Room -> one more than the highest room that it may import."""
    graph = {name: set(below.split()) for name, below in ROOMS.items()}
    found: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        found[name] = 1 + max((found[one] for one in graph.get(name, ())), default=0)
    return found


def entries(folder: Path) -> set[str]:
    """What stands in a folder, without what Python or an editor leaves there; folders without files do not count."""
    paths = [path for path in folder.iterdir() if path.name != "__pycache__" and not path.name.startswith(".")]
    return {path.name for path in paths if path.is_file() or any(path.rglob("*.py"))}


def listed(docstring: str) -> dict[str, str]:
    """The list of a room's `__init__.py`: name -> what it is."""
    return dict(re.findall(r"^- `([^`]+)`: (\S.*)$", docstring, flags=re.MULTILINE))


def right_list(folder: Path) -> str:
    """The list as it should be: what is written there stays, and what is missing is a module's first sentence."""
    written = listed(ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or "")
    lines = []
    for name in sorted(entries(folder) - {"__init__.py"}):
        path = folder / name
        shown = f"{name}/" if path.is_dir() else name
        source = path / "__init__.py" if path.is_dir() else path
        first = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) if source.suffix == ".py" else None
        lines.append(f"- `{shown}`: {written.get(shown) or (first or 'what it is').splitlines()[0].removesuffix('.')}")
    return "\n".join(lines)


def test_rooms_import_only_what_stands_below_them():
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    files = {
        ".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p.read_text(encoding="utf-8") for p in paths
    }
    assert not broken(files)


def test_the_table_has_no_circle_and_few_floors():
    found = floors()  # raises CycleError
    assert max(found[name] for name in ROOMS if (PACKAGE / name).is_dir()) <= 8


def test_the_package_holds_the_rooms_the_ground_and_the_public_files():
    there = entries(PACKAGE)
    rooms = {*PURPOSES, "testing"}
    assert there - NAMED_IN_FILES[""] == rooms | TOP_FILES, "move what else there is into a room"
    assert {name for name in there if (PACKAGE / name).is_dir()} == rooms


def test_the_spark_room_holds_its_rooms_and_the_daemon():
    assert entries(PACKAGE / "spark") - NAMED_IN_FILES["spark"] == SPARK_FOLDERS | SPARK_FILES


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_each_folder_says_what_it_is_for_and_lists_its_files(folder):
    name = folder.relative_to(PACKAGE).as_posix()
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree) or ""
    sentence, _, rest = docstring.partition("\n\n")
    if name in PURPOSES:
        assert sentence.removesuffix(".").lower() == PURPOSES[name].lower(), "the purpose, as in PURPOSES"
    assert sentence.endswith("."), "one sentence first"
    right = right_list(folder)
    there, wanted = set(listed(rest)), set(listed(right))
    assert rest == right, (
        f"sparkdeep/{name}/__init__.py: add {sorted(wanted - there)}, remove {sorted(there - wanted)}; "
        f"one line a file, in this order:\n\n{right}\n"
    )
    if name not in LAZY:
        assert not tree.body[1:], f"sparkdeep/{name}/__init__.py: a docstring, nothing else"


@pytest.mark.parametrize("name", sorted(LAZY))
def test_lazy_names_import_nothing_of_ours_by_themselves(name):
    tree = ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))
    assert not set(imports(tree))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_is_left_to_be_described(path):
    assert "TODO" not in path.read_text(encoding="utf-8")


def test_driver_and_replica_meet_in_the_protocol_only():
    above = {"stages", "rounds"}
    assert "replica" not in {one for name in above for one in ROOMS[name].split()}
    assert not above & set(ROOMS["replica"].split())


def test_the_check_sees_what_it_forbids():
    assert broken({"sparkdeep.replica.x": "from sparkdeep.stages.stage import Stage"})
    assert broken({"sparkdeep.stages.x": "def f():\n    from sparkdeep.replica.replica import Replica"})
    assert not broken(
        {"sparkdeep.stages.x": "from sparkdeep.protocol.messages import Update\nfrom sparkdeep import seams"}
    )


def test_the_list_reader_sees_files_and_what_they_are():
    assert listed("- `a.py`: it\n- `b/`: that\n- `c.py`:\nand `d.py`: no item") == {"a.py": "it", "b/": "that"}


def test_a_wrong_list_is_answered_by_the_right_one(tmp_path):
    (tmp_path / "__init__.py").write_text('"""A room.\n\n- `gone.py`: it was here\n- `old.py`: known\n"""\n')
    (tmp_path / "new.py").write_text('"""What is new.\n\nAnd more.\n"""\n')
    (tmp_path / "old.py").write_text('"""Not this sentence."""\n')
    (tmp_path / "below").mkdir()
    (tmp_path / "below/__init__.py").write_text('"""A room below."""\n')
    assert right_list(tmp_path) == "- `below/`: A room below\n- `new.py`: What is new\n- `old.py`: known"
