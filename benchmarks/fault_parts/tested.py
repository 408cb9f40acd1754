"""The parts that are tests: the fault matrix tier by tier, what tests count, random schedules, and the fuzzer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fault_parts.catalogue import read_rows
from fault_parts.tables import counted, matrix_table, verdicts

__all__ = ["TIERS", "run_counts", "run_fuzz", "run_matrix", "run_schedules"]

_ROOT: Final = Path(__file__).resolve().parents[2]
_COUNTS: Final = ("crash points", "unauthenticated calls")


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Tests that run in one process of pytest."""

    name: str
    marks: str
    """As for `pytest -m`."""
    places: tuple[str, ...]
    """Folders below the repository; those that are not there are left out."""
    limit_s: float
    """Generous: it ends what hangs."""


TIERS: Final = (
    Tier(
        name="twin",
        marks="not spark and not cluster and not jobs and not connect and not lts and not extras and not airflow",
        places=("tests/unit", "tests/repository", "tests/benchmarks", "tests/algorithms", "tests/faults"),
        limit_s=1800.0,
    ),
    Tier(name="local", marks="spark", places=("tests/spark",), limit_s=1800.0),
    Tier(name="jobs", marks="jobs", places=("tests/jobs",), limit_s=1800.0),
    Tier(name="connect", marks="connect", places=("tests/connect",), limit_s=900.0),
    # Apart: sessions of the two have other settings, and a process has one.
    Tier(name="cluster", marks="cluster", places=("tests/faults",), limit_s=3600.0),
    Tier(name="hosts", marks="cluster", places=("tests/cluster",), limit_s=1200.0),
)


def _pytest(
    arguments: Sequence[str], *, limit_s: float, examples: int | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Run pytest in a process of its own; what its tests said, and what went wrong with the process itself."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYSPARK_GATEWAY")}
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), str(_ROOT / "benchmarks")])
    environment.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    environment.setdefault("PYSPARK_PYTHON", sys.executable)
    if examples is not None:
        environment["SPARKDEEP_FAULT_EXAMPLES"] = str(examples)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "lines.jsonl"
        written.touch()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "fault_parts.pytest_rows"]
        command += ["--fault-lines", str(written), *arguments]
        process = subprocess.Popen(command, cwd=_ROOT, env=environment, start_new_session=True)  # noqa: S603 (pytest)
        problem = ""
        try:
            code = process.wait(timeout=limit_s)
            if code not in {0, 1}:
                problem = f"pytest ended with exit code {code}"
        except subprocess.TimeoutExpired:
            problem = f"not over after {limit_s:g} s"
        finally:
            if process.poll() is None and process.pid > 1:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=30.0)
        return [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()], problem


def _found(places: Sequence[str]) -> list[str]:
    return [str(path.relative_to(_ROOT)) for place in places for path in sorted(_ROOT.glob(place))]


def run_matrix(*, tiers: Sequence[str]) -> dict[str, Any]:
    """Every test that carries a row, tier by tier; JSON-ready.

    Args:
        tiers: names of those to run.
    """
    lines: list[dict[str, Any]] = []
    notes, problems = [], []
    for tier in TIERS:
        if tier.name not in tiers:
            notes.append(f"{tier.name}: not asked for")
            continue
        began = time.monotonic()
        found = _found(tier.places)
        got, problem = _pytest(["-m", tier.marks, *found], limit_s=tier.limit_s)
        lines += [{**line, "tier": tier.name} for line in got]
        problems += [problem] if problem else []
        wrong = [line for line in got if line["outcome"] == "failed"]
        notes.append(
            f"{tier.name}: {len(got)} tests, {len(wrong)} failed, {time.monotonic() - began:.0f} s"
            f"{f'; {problem}' if problem else ''}"
        )
        print(notes[-1], flush=True)
    rows = verdicts(read_rows(), lines)
    passed = [row for row in rows if row["verdict"] == "passed"]
    failed = [row for row in rows if row["verdict"] == "FAILED"]
    left = [row for row in rows if row["verdict"] == "not run"]
    whole = sum(not row["open"] for row in passed)
    words = f"{len(passed)} passed ({whole} in every phase)"
    words += f", FAILED: {', '.join(str(row['number']) for row in failed)}" if failed else ""
    words += f", not run here: {', '.join(str(row['number']) for row in left)}" if left else ""
    return {
        "title": "Fault matrix",
        "lines": [
            [f"fault matrix, {len(rows)} rows, {len({line['test'] for line in lines})} tests", words],
        ],
        "text": [
            matrix_table(rows),
            "on twin: threads and processes without Spark; local: local[2]; cluster: two workers.",
            "",
            *notes,
        ],
        "failed": bool(failed or problems),
        "result": {"rows": rows, "lines": lines, "tiers": notes},
    }


def _counted_lines(lines: Sequence[dict[str, Any]]) -> list[list[str]]:
    words = {"crash points": "tried, all recovered", "unauthenticated calls": "tried, all refused"}
    table = []
    for what in _COUNTS:
        sums = counted(lines, what)
        if sums:
            parts = "; ".join(f"{name} {count:,}" for name, count in sorted(sums.items()))
            table.append([what, f"{sum(sums.values()):,} {words[what]} ({parts})"])
    return table


def run_counts() -> dict[str, Any]:
    """The tests that count crash points and calls without the token, whether they carry a row or not."""
    pattern = re.compile(rf"record_property\(\s*f?[\"'](?:{'|'.join(_COUNTS)})")
    files = [
        str(path.relative_to(_ROOT))
        for path in sorted(_ROOT.glob("tests/**/test_*.py"))
        if pattern.search(path.read_text(encoding="utf-8"))
    ]
    lines, problem = _pytest(["--fault-all", "-m", TIERS[0].marks, *files], limit_s=900.0)
    table = _counted_lines(lines)
    failed = [line["test"] for line in lines if line["outcome"] == "failed"]
    missing = [what for what in _COUNTS if not any(what == row[0] for row in table)]
    table += [[what, "not run: no test counts them"] for what in missing]
    table += [["tests that count", f"FAILED: {', '.join(failed)} {problem}"]] if failed or problem else []
    return {
        "title": "What tests count",
        "lines": table,
        "text": [f"{len(lines)} tests in {', '.join(files)}"],
        "failed": bool(failed or problem),
        "result": {"lines": lines},
    }


def run_schedules(*, examples: int) -> dict[str, Any]:
    """Random lists of faults on the in-process twin, many more than the gate tries."""
    began = time.monotonic()
    lines, problem = _pytest(["tests/faults/test_schedules.py"], limit_s=120.0 + 5.0 * examples, examples=examples)
    failed = [line for line in lines if line["outcome"] == "failed"]
    whole = bool(lines) and not failed and not problem
    words = "every run equals the undisturbed one" if whole else f"FAILED {problem or 'see below'}"
    return {
        "title": "Random schedules",
        "lines": [[f"{examples:,} random lists of up to 4 faults on the twin", words]],
        "text": [f"{time.monotonic() - began:.0f} s", *(line["reason"] for line in failed)],
        "failed": not whole,
        "result": {"lines": lines},
    }


def run_fuzz(*, seconds: float, seed: int) -> dict[str, Any]:
    """Random and mutated bytes for everything that reads foreign bytes."""
    script = _ROOT / "tests/faults/fuzzing.py"
    if not script.exists():
        return {"title": "Fuzzing", "lines": [["fuzz inputs", "not run: there is no fuzzer here"]], "failed": False}
    command = [sys.executable, str(script), "--seconds", str(seconds), "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_ROOT / "tests")])}
    done = subprocess.run(  # noqa: S603 (our own script)
        command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=10 * seconds + 600.0, check=False
    )
    counts = {
        name: int(count) for name, count in re.findall(r"^fuzz ([^:]+): (\d+) inputs$", done.stdout, flags=re.MULTILINE)
    }
    whole = done.returncode == 0 and bool(counts)
    words = f"{sum(counts.values()):,} for {len(counts)} readers in {seconds:g} s"
    words += ": read, or refused by a named error" if whole else ": FAILED"
    table = ["| reader | inputs |", "|---|---|", *(f"| {name} | {count:,} |" for name, count in sorted(counts.items()))]
    return {
        "title": "Fuzzing",
        "lines": [[f"fuzz inputs (seed {seed})", words]],
        "text": [*table, *([] if whole else [done.stdout[-2000:] + done.stderr[-2000:]])],
        "failed": not whole,
        "result": {"inputs": counts, "seconds": seconds, "seed": seed},
    }
