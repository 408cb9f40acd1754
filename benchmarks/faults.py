"""What happens when things go wrong, tried: the fault matrix, random faults, a soak on two hosts, fuzzing, the guards' price.

python benchmarks/faults.py --out runs/faults [--only matrix,soak] [--rounds 200] [--seed 1] [--examples 1000] [--pairs 15]
    [--fuzz-seconds 60] [--tiers twin,local,jobs,connect,cluster,hosts]

(or spark-submit benchmarks/faults.py ...: every part starts what it needs in processes of its own.) Parts: matrix (the tests that
carry a row of benchmarks/fault_parts/matrix.toml), counts (crash points, calls without the run's token), schedules, fuzz, soak,
overhead. A part that fails is reported and the others go on. Writes faults.md, faults.json and readme.md, the short table.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from fault_parts.tables import summary_table, whole_text
from fault_parts.tested import TIERS, run_counts, run_fuzz, run_matrix, run_schedules
from measuring.surroundings import surroundings
from measuring.table import headline

PARTS: Final = ("matrix", "counts", "schedules", "fuzz", "soak", "overhead")


def _soak(**options: Any) -> dict[str, Any]:
    from fault_parts.soak import run

    return run(**options)


def _overhead(**options: Any) -> dict[str, Any]:
    import torch
    from fault_parts.overhead import run

    torch.set_num_threads(1)
    return run(**options)


def run_part(name: str, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run one; a failure of the part itself becomes its result."""
    began = time.monotonic()
    try:
        result = part()
    except Exception as error:  # noqa: BLE001 (the other parts go on; the command's exit code tells)
        traceback.print_exc()
        what = f"FAILED: {type(error).__name__}: {error}".replace("\n", " ")[:500]
        result = {"title": name, "lines": [[name, what]], "text": [traceback.format_exc()], "failed": True}
    return {"name": name, **result, "seconds": round(time.monotonic() - began, 1)}


def write(output: Path, about: dict[str, Any], parts: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """Write what is known so far."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "faults.md").write_text(whole_text(headline(about), parts), encoding="utf-8")
    (output / "readme.md").write_text(summary_table(parts), encoding="utf-8")
    content = {"about": about, "options": options, "parts": parts}
    (output / "faults.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    parser.add_argument("--only", default="", help=f"parts, by comma: {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=200, help="of the soak, in tens")
    parser.add_argument("--seed", type=int, default=1, help="of the soak and the fuzzer")
    parser.add_argument("--examples", type=int, default=1000, help="random schedules")
    parser.add_argument("--pairs", type=int, default=15, help="of the comparison without guards")
    parser.add_argument("--fuzz-seconds", type=float, default=60.0)
    parser.add_argument("--tiers", default=",".join(tier.name for tier in TIERS), help="of the matrix")
    given = parser.parse_args()
    chosen = [name for name in given.only.split(",") if name] or list(PARTS)
    tiers = [name for name in given.tiers.split(",") if name]
    known = [tier.name for tier in TIERS]
    if unknown := [name for name in chosen if name not in PARTS] + [name for name in tiers if name not in known]:
        parser.error(f"unknown: {unknown}; parts: {', '.join(PARTS)}; tiers: {', '.join(known)}")
    if given.rounds < 20 or given.rounds % 10 or given.examples < 1 or given.pairs < 1 or given.fuzz_seconds <= 0:
        parser.error("--rounds: tens, at least 20; --examples, --pairs, --fuzz-seconds: positive")
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "matrix": functools.partial(run_matrix, tiers=tiers),
        "counts": run_counts,
        "schedules": functools.partial(run_schedules, examples=given.examples),
        "fuzz": functools.partial(run_fuzz, seconds=given.fuzz_seconds, seed=given.seed),
        "soak": functools.partial(_soak, rounds=given.rounds, seed=given.seed),
        "overhead": functools.partial(_overhead, pairs=given.pairs),
    }
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    about, results = surroundings(), []
    for name in chosen:
        results.append(run_part(name, parts[name]))
        write(given.out, about, results, options)
        print(f"{summary_table(results[-1:])}({results[-1]['seconds']:g} s)\n", flush=True)
    print(f"written to {given.out}/")
    return int(any(part["failed"] for part in results))


if __name__ == "__main__":
    sys.exit(main())
