"""Which room may import which: the one table, and the test that holds the code to it."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator

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
    "__main__": "cli",
}
GROUND_ROOMS = {"errors": "", "seams": "", "versions": "", "checks": "errors"}


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


def test_rooms_import_only_what_stands_below_them():
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    files = {
        ".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p.read_text(encoding="utf-8") for p in paths
    }
    assert not broken(files)


def test_the_table_has_no_circle_and_few_floors():
    graph = {name: set(below.split()) for name, below in ROOMS.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    floors: dict[str, int] = {}
    for name in order:
        floors[name] = 1 + max((floors[one] for one in graph.get(name, ())), default=0)
    assert max(floors[name] for name in ROOMS if (PACKAGE / name).is_dir()) <= 8


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
