"""Mutants of the heart: one operator, number, result or call is changed, and the tests that run the line must notice.

    make coverage                                   # once, whole or in parts: which test runs which line
    python benchmarks/mutants.py [--count 15] [--processes 2] [--checkout .] [FILE ...]

Of each file (default: `HEART`) `--count` mutants are drawn, the same ones every time. Each stands in a copy of the checkout,
and the tests without a JVM that ran its line, the quickest first, run there until one fails. What no test ran counts as
alive. Before that, the tests run on the unchanged copy: one that fails there says nothing, and is left out.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

HEART: Final = (
    "sparkdeep/tensors/mean.py",
    "sparkdeep/stages/gathering.py",
    "sparkdeep/stages/star.py",
    "sparkdeep/optim/schedule.py",
    "sparkdeep/storage/checkpoints.py",
    "sparkdeep/storage/lease.py",
    "sparkdeep/data/order.py",
    "sparkdeep/data/shards.py",
    "sparkdeep/optim/aggregators.py",
    "sparkdeep/optim/outer.py",
    "sparkdeep/protocol/wire.py",
)
_COVERAGE: Final = "build/coverage/combined"
_SWAPS: Final[dict[type, Any]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_MOST_TESTS: Final = 40
_LIMIT_S: Final = 180.0


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    file: str
    line: int
    change: str
    source: str
    """The whole file with it."""


def mutants_of(file: str, source: str, count: int | None = None) -> list[Mutant]:
    """Changes of a file, all or as many as are drawn, each time the same; messages of errors and defaults are left alone."""
    found = []
    places = range(len(list(_places(ast.parse(source)))))
    for place in places if count is None else random.Random(file).sample(places, min(count, len(places))):  # noqa: S311
        tree = ast.parse(source)
        node, parent = list(_places(tree))[place]
        before = ast.unparse(node).partition("\n")[0]
        after = _changed(node, parent)
        changed = ast.unparse(ast.fix_missing_locations(tree))
        found.append(Mutant(file, node.lineno, f"{before} -> {after}", changed))
    return found


def _places(tree: ast.AST, inside: bool = False) -> Iterator[tuple[ast.expr | ast.stmt, ast.AST]]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Raise | ast.Assert | ast.arguments):
            continue
        inner = inside or isinstance(child, ast.FunctionDef)
        swapped = isinstance(child, ast.BinOp | ast.BoolOp) and type(child.op) in _SWAPS
        number = isinstance(child, ast.Constant) and isinstance(child.value, int | float)
        called = isinstance(child, ast.Expr) and isinstance(child.value, ast.Call)
        if inner and (
            swapped or number or called or isinstance(child, ast.Compare | ast.If | ast.AugAssign | ast.Return)
        ):
            assert isinstance(child, ast.expr | ast.stmt)
            nothing = isinstance(child, ast.Return) and (child.value is None or ast.unparse(child.value) == "None")
            if not nothing:
                yield child, tree
        yield from _places(child, inner)


def _changed(node: ast.expr | ast.stmt, parent: ast.AST) -> str:
    """Change the node in its tree; what it is now."""
    match node:
        case ast.Compare():
            node.ops[0] = _SWAPS[type(node.ops[0])]()
        case ast.BinOp() | ast.BoolOp():
            node.op = _SWAPS[type(node.op)]()
        case ast.Constant(value=bool()):
            node.value = not node.value
        case ast.Constant():
            node.value = node.value + 1  # type: ignore[operator]
        case ast.If():
            node.test = ast.UnaryOp(ast.Not(), node.test)
            return f"if {ast.unparse(node.test)}"
        case ast.Return():
            node.value = ast.Constant(None)
        case _:
            for _, block in ast.iter_fields(parent):
                if isinstance(block, list) and node in block:
                    block[block.index(node)] = ast.Pass()
            return "pass"
    return ast.unparse(node)


class Checkout:
    """What ran where, and copies in which mutants stand.

    Args:
        root: of the checkout, in which `make coverage` was run.
    """

    def __init__(self, root: Path) -> None:
        import coverage

        self.root = root
        self._data = coverage.CoverageData(str(root / _COVERAGE))
        self._data.read()
        listed = self._pytest(root, ["--collect-only", "-m", "not spark", "tests/unit", "tests/algorithms"]).stdout
        names = sorted({line.partition("[")[0] for line in listed.splitlines() if "::" in line})
        self._tests = {f"{Path(name.partition('::')[0]).stem}.{name.partition('::')[2]}": name for name in names}
        self._tests = {context.replace("::", "."): name for context, name in self._tests.items()}

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Those that ran its line: of functions that run few lines of the file first, as they are about them."""
        contexts = self._data.contexts_by_lineno(str(self.root / mutant.file))
        breadth = Counter(context for line in contexts.values() for context in line)
        ran = sorted(contexts.get(mutant.line, []), key=lambda context: (breadth[context], context))
        return [self._tests[context] for context in ran if context in self._tests][:_MOST_TESTS]

    def copy(self, to: Path) -> Path:
        """A copy without what git ignores."""
        listed = subprocess.run(
            ["git", "ls-files", "-z"],  # noqa: S607 (whichever git is there)
            cwd=self.root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in filter(None, listed.split("\0")):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.root / name, to / name)
        return to

    def failing(self, copy: Path, tests: Sequence[str], *, first: bool) -> list[str]:
        """Those of the tests that fail in a copy, or the first of them; all of them where they do not end."""
        try:
            done = self._pytest(copy, [*(["-x"] if first else []), *tests])
        except subprocess.TimeoutExpired:
            return list(tests)
        if done.returncode not in {0, 1}:
            return list(tests)
        failed = re.findall(r"^(?:FAILED|ERROR) ([^\s\[]+)", done.stdout, flags=re.MULTILINE)
        return sorted(set(failed) if done.returncode else set())

    @staticmethod
    def _pytest(folder: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("COVERAGE_PROCESS_START", None)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", "--tb=no", *arguments]
        return subprocess.run(  # noqa: S603 (this interpreter)
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )


def verdict(checkout: Checkout, copy: Path, mutant: Mutant, useless: set[str]) -> str:
    """Whether a test notices the mutant in a copy that is otherwise unchanged: "killed", "alive" or "not run"."""
    tests = [name for name in checkout.tests_of(mutant) if name not in useless]
    if not tests:
        return "not run"
    path = copy / mutant.file
    source = path.read_text(encoding="utf-8")
    path.write_text(mutant.source, encoding="utf-8")
    try:
        return "killed" if checkout.failing(copy, tests, first=True) else "alive"
    finally:
        path.write_text(source, encoding="utf-8")


def main() -> None:
    """Draw, try, and print a table and what is alive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=HEART)
    parser.add_argument("--count", type=int, default=15)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parent.parent)
    arguments = parser.parse_args()
    checkout = Checkout(arguments.checkout.resolve())
    sources = {file: (checkout.root / file).read_text(encoding="utf-8") for file in arguments.files}
    drawn = {file: mutants_of(file, source, arguments.count) for file, source in sources.items()}
    with contextlib.ExitStack() as stack:
        copies: queue.Queue[Path] = queue.Queue()
        for _ in range(arguments.processes):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sparkdeep-mutants-"))
            copies.put(checkout.copy(Path(folder)))
        pool = stack.enter_context(ThreadPoolExecutor(arguments.processes))

        def tried(mutant: Mutant) -> str:
            copy = copies.get()
            try:
                return verdict(checkout, copy, mutant, useless)
            finally:
                copies.put(copy)

        print("| file | killed | alive | not run |\n|---|--:|--:|--:|")
        alive = []
        for file, mutants in drawn.items():
            tests = sorted({name for mutant in mutants for name in checkout.tests_of(mutant)})
            copy = copies.get()
            useless = set(checkout.failing(copy, tests, first=False)) if tests else set()
            copies.put(copy)
            verdicts = list(pool.map(tried, mutants))
            count = Counter(verdicts)
            print(f"| {file} | {count['killed']} | {count['alive']} | {count['not run']} |", flush=True)
            alive += [(m, v) for m, v in zip(mutants, verdicts, strict=True) if v != "killed"]
    for mutant, word in alive:
        print(f"{mutant.file}:{mutant.line}: {word}: {mutant.change}")


if __name__ == "__main__":
    main()
