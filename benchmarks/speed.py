"""sparkdeep measured beside what else there is, in one run on one machine: a table, JSON and plots.

spark-submit benchmarks/speed.py [--quick] [--only throughput,exchange] [--pairs 9] [--output runs/benchmark]
    [--data DIR] [--lts-python .venv-lts/bin/python]

Within a section the contenders are measured in turn, pair by pair; tables show the median (least to most). A section
that fails is reported and the others go on. Writes benchmark.md, benchmark.json and a PNG a section.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Final

from measuring.plots import can_plot, plot_section
from measuring.surroundings import surroundings
from measuring.table import headline, section_table

SECTIONS: Final = (
    "throughput",
    "exchange",
    "codecs",
    "coordinator_limit",
    "memory",
    "heap",
    "overheads",
    "ingest",
    "transform",
    "reading",
    "accuracy",
    "network",
)
CORES: Final = 2


@functools.cache
def spark_session() -> Any:
    """local[2] without a UI; Python workers find `benchmarks`."""
    from pyspark.sql import SparkSession

    folder = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH", "")])])
    return (
        SparkSession.builder.master(f"local[{CORES}]")
        .appName("sparkdeep benchmark")
        .config("spark.ui.enabled", "false")
        .config("spark.executorEnv.PYTHONPATH", os.environ["PYTHONPATH"])
        .config("spark.sql.shuffle.partitions", str(CORES))
        .getOrCreate()
    )


def run_section(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Measure one section, giving it the arguments that its `measure` takes; a failure becomes its note."""
    began = time.monotonic()
    try:
        measure = importlib.import_module(f"speed_parts.{name}").measure
        taken = inspect.signature(measure).parameters
        section: dict[str, Any] = measure(
            **{key: value() if key == "spark" else value for key, value in given.items() if key in taken}
        )
        section["failed"] = False
    except Exception as error:  # noqa: BLE001 (the other sections go on; the command's exit code tells)
        traceback.print_exc()
        section = {"title": name, "rows": [], "notes": [f"FAILED: {type(error).__name__}: {error}"], "failed": True}
    return {"name": name, **section, "seconds": round(time.monotonic() - began, 1)}


def write(output: Path, about: dict[str, Any], sections: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """Write what is known so far as Markdown and JSON."""
    output.mkdir(parents=True, exist_ok=True)
    text = "\n".join([f"{headline(about)}; median (least to most)\n", *map(section_table, sections)])
    (output / "benchmark.md").write_text(text, encoding="utf-8")
    content = {"about": about, "options": options, "sections": sections}
    (output / "benchmark.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every section in small, 2 minutes in all")
    parser.add_argument("--only", default="", help=f"sections, by comma: {','.join(SECTIONS)}")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--data", type=Path, help="folder with mnist10k.parquet; without it scikit-learn's digits")
    parser.add_argument("--lts-python", type=Path, help="Python of the LTS environment, for petastorm")
    arguments = parser.parse_args()
    chosen = [name for name in arguments.only.split(",") if name] or list(SECTIONS)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"--only: unknown sections {unknown}; known: {', '.join(SECTIONS)}")
    if arguments.pairs < 1:
        parser.error(f"--pairs {arguments.pairs}: at least 1")
    given = {
        "spark": spark_session,
        "pairs": arguments.pairs,
        "quick": arguments.quick,
        "data": arguments.data,
        "lts_python": arguments.lts_python,
    }
    # What sections make (processes, network namespaces) is removed as they unwind, also when the run is told to end.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    about, sections = surroundings(), []
    if problem := can_plot():
        print(problem)
    for name in chosen:
        section = run_section(name, given)
        sections.append(section)
        write(arguments.output, about, sections, {"quick": arguments.quick, "pairs": arguments.pairs})
        if not problem:
            plot_section(section, arguments.output / f"{name}.png")
        print(f"{section_table(section)}\n({section['seconds']:g} s)\n", flush=True)
    print(f"written to {arguments.output}/")
    return int(any(section["failed"] for section in sections))


if __name__ == "__main__":
    sys.exit(main())
