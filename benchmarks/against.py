"""This checkout beside another one, in turn, in one run: rows a second of training, and seconds of an exchange.

    python benchmarks/against.py OTHER [--pairs 21] [--output against.md]

OTHER is the folder of another checkout, such as a worktree of an earlier commit. Each side is a process with a Spark session of
its own; a pair is one fit by each of them. Of the ratios, this checkout over the other, where more is better, it prints the median
and the bound below which the median lies with at most 5 % probability (of order statistics: nothing is assumed of how they are
distributed).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measuring.rows import interleaved
from measuring.surroundings import surroundings
from measuring.table import headline

_HERE: Final = Path(__file__).resolve().parent
_ROWS: Final = 20_000
# name -> (which figure, more is better, the fit): a perceptron by rounds of so many steps, and 40 MB of parameters
_FITS: Final[dict[str, tuple[str, bool, dict[str, int]]]] = {
    "sync_every=1": ("rows/s", True, {"hidden": 256, "rows": 10_000, "epochs": 2, "sync_every": 1}),
    "sync_every=10": ("rows/s", True, {"hidden": 256, "rows": _ROWS, "epochs": 3, "sync_every": 10}),
    "sync_every=50": ("rows/s", True, {"hidden": 256, "rows": _ROWS, "epochs": 5, "sync_every": 50}),
    "exchange, 40 MB": ("exchange s", False, {"hidden": 2_800, "rows": 2_048, "epochs": 1, "sync_every": 1}),
}


class Side:
    """A process that fits with the package of one checkout."""

    def __init__(self, checkout: Path, table: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), str(_HERE / "speed_parts")])}
        environment |= {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
        self._process = subprocess.Popen(  # noqa: S603 (this checkout's own file)
            [sys.executable, str(_HERE / "speed_parts" / "side.py"), table],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=checkout,
            env=environment,
            text=True,
        )
        package = Path(self._answer()["package"])
        if checkout.resolve() not in package.resolve().parents:
            raise RuntimeError(f"the side of {checkout} imported {package}: uninstall what shadows it")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with {self._process.wait()}; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def fit(self, name: str) -> float:
        """The figure of one fit."""
        figure, _, options = _FITS[name]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(options) + "\n")
        self._process.stdin.flush()
        return float(self._answer()[figure])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def lower_bound(values: Sequence[float], doubt: float = 0.05) -> float:
    """What the median of the distribution of `values` exceeds with a probability of at least `1 - doubt`.

    The k-th smallest of n values is above the median with the probability that fewer than k of n coins show heads.
    """
    n, below, k = len(values), 0.0, 0
    while (below := below + math.comb(n, k) / 2**n) <= doubt:
        k += 1
    if k == 0:
        raise ValueError(f"{n} pairs say nothing with a doubt of {doubt:g}: take at least 5")
    return sorted(values)[k - 1]


def _write_table(path: Path) -> None:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((_ROWS, 784), dtype=np.float32)  # (rows, features) float32
    offsets = pa.array(np.arange(0, features.size + 1, 784, dtype=np.int32))
    columns = {"features": pa.ListArray.from_arrays(offsets, pa.array(features.reshape(-1)))}
    pq.write_table(pa.table({**columns, "label": generator.integers(0, 10, _ROWS)}), path, row_group_size=4096)


def compared(ratios: dict[str, list[float]]) -> list[str]:
    """Rows of a Markdown table."""
    lines = ["| what | median ratio | lower bound, 95 % | least to most |", "|---|--:|--:|---|"]
    for name, values in ratios.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        lines.append(f"| {name} | {statistics.median(values):.3f} | {lower_bound(values):.3f} | {spread} |")
    return lines


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sparkdeep-against-") as folder:
        _write_table(Path(folder) / "rows.parquet")
        table = (Path(folder) / "rows.parquet").as_uri()
        sides = {"this": Side(_HERE.parent, table), "other": Side(arguments.other.resolve(), table)}
        ratios: dict[str, list[float]] = {}
        for name, (_, more_is_better, _) in _FITS.items():
            for side in sides.values():
                side.fit(name)  # the first of its kind starts workers and compiles
            measures = {key: (lambda side=side, name=name: side.fit(name)) for key, side in sides.items()}
            found = interleaved(measures, arguments.pairs)
            over, under = ("this", "other") if more_is_better else ("other", "this")
            ratios[name] = [a / b for a, b in zip(found[over], found[under], strict=True)]
            print(f"{name}: {statistics.median(ratios[name]):.3f}", file=sys.stderr, flush=True)
        for side in sides.values():
            side.close()
    text = "\n".join([headline(surroundings()), "", *compared(ratios), ""])
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
