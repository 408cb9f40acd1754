"""Hundreds of rounds on two hosts with a random fault every few rounds: the same bits, and nothing grows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

__all__ = ["problems", "run"]

_BENCHMARKS: Final = Path(__file__).resolve().parents[1]
SLOPE_MB: Final = 0.1
A_ROUND_S: Final = 8.0
_STOP_S: Final = 120.0


def problems(result: dict[str, Any]) -> list[str]:
    """What of a soak's promises was not kept."""
    found = []
    rounds, lost = result["rounds"], result["rounds begun"] - result["rounds"]
    if result["never happened"]:
        found.append(f"planned, but never happened: {result['never happened']}")
    if result["differing tensors"] or not result["same losses"]:
        found.append(f"not the undisturbed run: {result['differing tensors'] or 'losses'} differ")
    if sorted(set(result["rounds told"])) != list(range(1, rounds + 1)):
        found.append("rounds have a gap")
    if lost > result["planned"]:
        found.append(f"{lost} rounds of work lost to {result['planned']} faults: at most one each")
    slopes = result["slopes"]
    if slopes["driver_mb"] >= SLOPE_MB:
        found.append(f"the driver's memory grew by {slopes['driver_mb']:.3f} MB a round: less than {SLOPE_MB:g}")
    found += [
        f"{key} grew by {slopes[key]:.3f} a round" for key in ("descriptors", "threads", "files") if slopes[key] >= 0.1
    ]
    return found


def _finish(process: subprocess.Popen[bytes], *, timeout_s: float) -> None:
    """Wait for the soak; one that is not over in time is interrupted, so that it takes its cluster along.

    Raises:
        RuntimeError: it failed, or was not over.
    """
    try:
        code = process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=_STOP_S)
        finally:
            process.kill()
        raise RuntimeError(f"the soak was not over after {timeout_s:g} s") from None
    if code:
        raise RuntimeError(f"the soak ended with exit code {code}; what it said is above")


def run(*, rounds: int, seed: int) -> dict[str, Any]:
    """The soak in a process and a session of its own; JSON-ready."""
    with tempfile.TemporaryDirectory(prefix="sparkdeep-soak-") as name:
        work, answer = Path(name) / "cluster", Path(name) / "result.json"
        work.mkdir()
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYSPARK_GATEWAY")}
        kept["PYTHONPATH"] = os.pathsep.join([str(_BENCHMARKS.parent), str(_BENCHMARKS), kept.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", "from fault_parts.soak_fit import main; main()"]
        command += [str(rounds), str(seed), str(work), str(answer)]
        _finish(subprocess.Popen(command, env=kept), timeout_s=600.0 + A_ROUND_S * rounds)  # noqa: S603 (this package)
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    wrong = problems(result)
    slopes, lost = result["slopes"], result["rounds begun"] - result["rounds"]
    lines = [
        [
            f"soak: {rounds} rounds on two hosts, {result['planned']} faults (seed {seed})",
            "; ".join(wrong) if wrong else "completes, equals the undisturbed run bit for bit",
        ],
        ["rounds of work lost, at most one a fault", f"{lost} of {result['planned']}"],
        [
            f"driver memory over the last {result['over']} rounds, under {SLOPE_MB:g} MB a round",
            f"{slopes['driver_mb']:+.3f}; descriptors {slopes['descriptors']:+.3f}, files {slopes['files']:+.3f}",
        ],
    ]
    text = [
        "| fault | times |",
        "|---|---|",
        *(f"| {kind} | {count} |" for kind, count in sorted(result["faults"].items())),
    ]
    text += ["", f"{result['seconds']:g} s, undisturbed {result['undisturbed_seconds']:g} s; growth a round: "]
    text[-1] += ", ".join(f"{key} {value:+.3f}" for key, value in slopes.items())
    return {
        "title": "Soak on two hosts",
        "lines": lines,
        "text": text,
        "failed": bool(wrong),
        "result": result,
    }
