from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "sparkdeep"
FILES = sorted(PACKAGE.rglob("*.py"))
SPARK = PACKAGE / "spark"

MAX_LINES = 350
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 8
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}

# The two facades: what a user writes out by hand, and what it gives. Everything else with many arguments takes a
# settings object.
MANY_ARGUMENTS = {"TorchEstimator", "TorchModel"}

# Where code that can run what it reads is called, and why that is safe. (file, call) -> reason.
UNPICKLERS = {
    ("models/packing.py", "pickle.loads"): "the user's own program, sent inside Spark's task closure",
    ("models/packing.py", "pickle.Unpickler"): "as above: the same bytes, with tensors by name",
    ("spark/tasks/child.py", "cloudpickle.loads"): "the replica's task, from the pipe of the process that started it",
    ("spark/model/scoring.py", "cloudpickle.loads"): "the user's own callables, sent inside Spark's task closure",
    ("spark/ingest/tasks.py", "cloudpickle.loads"): "the user's own decoder, sent inside Spark's task closure",
    ("models/saving.py", "cloudpickle.loads"): "only with trust_pickle=True, which the caller writes out",
    ("models/keras.py", "deserialize_keras_object"): "the config of the user's own network, inside the same pickle",
}

# Where a module is imported by a name that is not written there, and whose name that is. (file, function) -> reason.
IMPORTERS = {
    ("__init__.py", "__getattr__"): "our own modules, by a table",
    ("models/export.py", "_check_onnx"): "two packages that the line above names",
    ("models/registry.py", "import_factory"): "what the user's own configuration names",
    (
        "models/registry.py",
        "_module_named",
    ): "a stored name, only if its module is in allow_modules, which the caller writes out",
    ("spark/daemon.py", "main"): "packages that a table names",
    ("tracking/__init__.py", "__getattr__"): "our own modules, by a table",
    ("spark/doctor/probes.py", "package_versions"): "packages that a table names",
    ("tracking/mlflow.py", "mlflow_module"): "parts of mlflow",
}
_LOADERS = {
    "pickle": {"load", "loads", "Unpickler"},
    "cloudpickle": {"load", "loads"},
    "dill": {"load", "loads"},
    "joblib": {"load"},
    "marshal": {"load", "loads"},
    "shelve": {"open"},
    "torch": {"load"},
    "yaml": {"load", "unsafe_load", "full_load", "load_all", "unsafe_load_all"},
    "numpy": {"load"},  # whatever allow_pickle says: the wire and the disk hold other formats
    "pandas": {"read_pickle"},
    "torch.jit": {"load"},
    "torch.export": {"load"},
    "torch.hub": {"load", "load_state_dict_from_url"},
    "torch.package": {"PackageImporter"},
    "torch.serialization": {"load"},
    "torch.distributed": {"broadcast_object_list", "all_gather_object", "gather_object", "recv_object_list"},
    "torch.distributed.checkpoint": {"load", "load_state_dict"},  # its metadata is a pickle
    "runpy": {"run_path", "run_module"},
    "code": {"InteractiveInterpreter", "InteractiveConsole"},
    "multiprocessing.connection": {"Client", "Listener"},  # its recv unpickles
    "pyspark.serializers": {"CPickleSerializer", "PickleSerializer", "CloudPickleSerializer"},
    "pyspark.ml.util.DefaultParamsReader": {"loadParamsInstance"},  # imports the class that a file names
}
_BUILTIN_LOADERS = {"eval", "exec", "compile"}
# By whatever module: what they are called is enough.
_LOADING_WORDS = {
    "deserialize_keras_object",
    "load_model",
    "from_pretrained",
    "allow_pickle",
}
_IMPORTING = {"importlib.import_module", "__import__", "importlib.__import__", "builtins.__import__"}


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, name: str = "sparkdeep.x") -> Iterator[str]:
    """Every module that a tree imports; `from a import b` gives both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*name.split(".")[: -node.level], *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and ast.unparse(node.func) in {"importlib.import_module", "import_module", "__import__"}
        ):
            yield str(node.args[0].value)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imports_at_module_level(tree: ast.Module, name: str) -> set[str]:
    """Imports that run when the module is imported: not in functions, not for the type checker."""
    found: set[str] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= set(imported(node, name))
        todo.extend(ast.iter_child_nodes(node))
    return found


def imports_pyspark(tree: ast.AST) -> bool:
    return any(name.split(".")[0] in {"pyspark", "py4j"} for name in imported(tree))


def names_of_imports(tree: ast.AST) -> dict[str, str]:
    """Local name -> what it stands for, so that `from os import environ as e` and `import torch as t` are seen."""
    table: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            table |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            table |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return table


def full_name(node: ast.AST, table: dict[str, str]) -> str:
    head, dot, rest = ast.unparse(node).partition(".")
    return table.get(head, head) + dot + rest


def reads_environment(tree: ast.AST) -> bool:
    table = names_of_imports(tree)
    names = {
        full_name(node, table)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and node.id in table)
    }
    return bool(names & {"os.environ", "os.getenv", "os.environb", "os.getenvb"})


def loader_calls(tree: ast.AST) -> set[str]:
    """Uses, not only calls, of what can run stored code: `f = pickle.loads` counts, and so does a subclass."""
    table = names_of_imports(tree)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = full_name(node, table)
            module, _, attribute = name.rpartition(".")
            if attribute in _LOADERS.get(module, set()):
                found.add(name)
            if attribute in _LOADING_WORDS and isinstance(node, ast.Attribute):
                found.add(attribute)
        if isinstance(node, ast.keyword) and node.arg in _LOADING_WORDS:
            found.add(node.arg)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BUILTIN_LOADERS:
            found.add(node.func.id)
    return found


def free_imports(tree: ast.AST) -> set[str]:
    """The functions in which a module is imported by a name that is computed; "" for the module's own level."""
    table = names_of_imports(tree)
    found: set[str] = set()

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and full_name(node.func, table) in _IMPORTING:
            fixed = bool(node.args) and isinstance(node.args[0], ast.Constant)
            if not fixed:
                found.add(function)
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(tree, "")
    return found


def long_constructors(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    arguments = item.args
                    count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]) - 1
                    if count > MAX_ARGUMENTS:
                        found.add(node.name)
    return found


def long_functions(tree: ast.AST) -> set[str]:
    """Functions of more lines than allowed, decorators and docstring included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min(line.lineno for line in [node, *node.decorator_list])
            if (node.end_lineno or first) - first + 1 > MAX_FUNCTION_LINES:
                found.add(node.name)
    return found


def edges(files: dict[str, ast.Module]) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for name, tree in files.items():
        targets = {target for target in imports_at_module_level(tree, name) if target in files and target != name}
        # `from package import module` names the package too, whose __init__ is above its own modules by nature.
        graph[name] = {target for target in targets if not name.startswith(f"{target}.")}
    return graph


@pytest.mark.parametrize("path", [p for p in FILES if SPARK not in p.parents], ids=module_name)
def test_pyspark_is_imported_only_behind_its_door(path):
    assert not imports_pyspark(parse(path)), f"{path}: move what needs pyspark to sparkdeep/spark/"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_module_is_a_drawer_for_everything(path):
    assert path.stem not in FORBIDDEN_NAMES, f"{path}: name the module by its one idea"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_stay_short_enough_to_read(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines; split it by idea"


def test_imports_at_module_level_have_no_cycle():
    graph = edges({module_name(path): parse(path) for path in FILES})
    assert graph
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    "path", [p for p in FILES if SPARK not in p.parents and p != PACKAGE / "models/keras.py"], ids=module_name
)
def test_environment_is_read_only_for_keras_and_behind_the_spark_door(path):
    assert not reads_environment(parse(path)), f"{path}: take the value as an argument"


def test_stored_code_is_run_only_where_the_list_says_why():
    used = {(path.relative_to(PACKAGE).as_posix(), call) for path in FILES for call in loader_calls(parse(path))}
    assert not used - set(UNPICKLERS), "find another way, or add the place to UNPICKLERS with its reason"
    assert not set(UNPICKLERS) - used, "remove from UNPICKLERS what is no longer there"


def test_modules_are_imported_by_computed_names_only_where_the_list_says_whose_they_are():
    used = {(path.relative_to(PACKAGE).as_posix(), name) for path in FILES for name in free_imports(parse(path))}
    assert not used - set(IMPORTERS), "write the name out, or add the place to IMPORTERS with its reason"
    assert not set(IMPORTERS) - used, "remove from IMPORTERS what is no longer there"


def test_constructors_take_few_arguments():
    long = {name for path in FILES for name in long_constructors(parse(path))}
    assert not long - MANY_ARGUMENTS, "take a frozen settings dataclass"


def test_functions_stay_short_enough_to_read():
    long = {(path.relative_to(PACKAGE).as_posix(), name) for path in FILES for name in long_functions(parse(path))}
    assert not long, f"no function of more than {MAX_FUNCTION_LINES} lines: split it by idea"


# Each check, held to code that breaks its rule: a check that cannot fail proves nothing.


@pytest.mark.parametrize(
    "code",
    [
        "import pyspark",
        "def f():\n    from pyspark.sql import functions",
        "import importlib\nimportlib.import_module('pyspark.ml')",
        "from py4j.java_gateway import X",
    ],
)
def test_pyspark_check_sees(code):
    assert imports_pyspark(ast.parse(code))


def test_pyspark_check_lets_others_pass():
    assert not imports_pyspark(ast.parse("import pysparkling\nfrom sparkdeep.spark import door"))


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.environ['A']",
        "import os\ndef f():\n    return os.getenv('A')",
        "from os import environ as e\ne.get('A')",
        "import os as system\nsystem.environ.get('A')",
    ],
)
def test_environment_check_sees(code):
    assert reads_environment(ast.parse(code))


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ("import pickle\npickle.loads(b)", "pickle.loads"),
        ("import pickle as p\np.load(f)", "pickle.load"),
        ("from pickle import loads as read\nread(b)", "pickle.loads"),
        ("import pickle\nread = pickle.loads", "pickle.loads"),
        ("import pickle\nclass U(pickle.Unpickler): pass", "pickle.Unpickler"),
        ("import torch\ntorch.load(f, weights_only=True)", "torch.load"),
        ("import yaml\nyaml.load(f)", "yaml.load"),
        ("import cloudpickle\ncloudpickle.loads(b)", "cloudpickle.loads"),
        ("eval('1')", "eval"),
        ("compile(text, 'f', 'exec')", "compile"),
        ("import numpy as np\nnp.load(f)", "numpy.load"),
        ("from numpy import load\nload(f)", "numpy.load"),
        ("import torch\ntorch.jit.load(f)", "torch.jit.load"),
        ("from torch.package import PackageImporter\nPackageImporter(f)", "torch.package.PackageImporter"),
        ("import joblib\njoblib.load(f)", "joblib.load"),
        ("import runpy\nrunpy.run_path(p)", "runpy.run_path"),
        ("import pandas\npandas.read_pickle(f)", "pandas.read_pickle"),
        ("keras().saving.deserialize_keras_object(c)", "deserialize_keras_object"),
        ("from transformers import AutoModel\nAutoModel.from_pretrained(n)", "from_pretrained"),
        ("read(f, allow_pickle=True)", "allow_pickle"),
    ],
)
def test_stored_code_check_sees(code, call):
    assert loader_calls(ast.parse(code)) == {call}


def test_stored_code_check_lets_eval_mode_and_json_pass():
    assert not loader_calls(ast.parse("import json\nmodel.eval()\njson.loads(s)"))
    assert not loader_calls(ast.parse("import re, safetensors.numpy\nre.compile(s)\nsafetensors.numpy.load(b)"))


@pytest.mark.parametrize(
    ("code", "where"),
    [
        ("import importlib\ndef f(n):\n    return importlib.import_module(n)", "f"),
        ("from importlib import import_module as load\ndef f(n):\n    def g():\n        load(f'a.{n}')", "g"),
        ("class A:\n    def m(self, n):\n        __import__(n)", "m"),
        ("import importlib\nimportlib.import_module(name='x')", ""),
    ],
)
def test_import_check_sees(code, where):
    assert free_imports(ast.parse(code)) == {where}


def test_import_check_lets_written_names_pass():
    assert not free_imports(ast.parse("import importlib\nimportlib.import_module('petastorm')\n__import__('x')"))


def test_cycle_check_sees_a_cycle_and_ignores_imports_in_functions():
    a, b = "from sparkdeep.b import x", "from sparkdeep import a"
    names = ("sparkdeep.a", "sparkdeep.b")
    graph = edges(dict(zip(names, map(ast.parse, (a, b)), strict=True)))
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()
    lazy = "def f():\n    from sparkdeep import a"
    graph = edges(dict(zip(names, map(ast.parse, (a, lazy)), strict=True)))
    graphlib.TopologicalSorter(graph).prepare()


def test_constructor_check_counts_without_self():
    arguments = ", ".join(f"a{i}" for i in range(MAX_ARGUMENTS))
    fits = f"class A:\n    def __init__(self, {arguments}): ..."
    assert not long_constructors(ast.parse(fits))
    assert long_constructors(ast.parse(fits.replace(arguments, f"{arguments}, *, b"))) == {"A"}


@pytest.mark.parametrize("head", ["def f():", "async def f():", "@a\n@b\ndef f():", "class A:\n def f(self):"])
def test_function_check_counts_every_line(head):
    body = "\n".join(["  pass"] * (MAX_FUNCTION_LINES - len(head.replace("class A:\n", "").splitlines())))
    assert not long_functions(ast.parse(f"{head}\n{body}"))
    assert long_functions(ast.parse(f"{head}\n{body}\n  pass")) == {"f"}
