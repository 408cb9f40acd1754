"""The driver's Python memory in a fit, in multiples of the parameters, and the bytes it moves a round."""

from __future__ import annotations

import gc
import re
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from measuring.processes import Processes
from measuring.rows import row

from speed_parts.fake_replicas import open_fake_fit

__all__ = ["measure"]

REPLICAS: Final = (2, 4, 8)
ROUNDS: Final = 3
AGGREGATIONS: Final = ("star", "ring")
NUMEL: Final = 25_000_000  # float32: 100 MB


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"no {field} in /proc/self/status"
    return 1024 * int(found[1])


def _peak_from_here() -> int:
    """Forget the peak so far; gives the resident bytes now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _driver(rank: int, connection: Connection, replicas: int, numel: int, aggregation: str) -> None:
    """A fresh driver: fits with stand-ins, and tells of its peaks and its traffic in multiples of P."""
    del rank
    _fit(replicas, 1000, aggregation)  # what is loaded and started once is part of the idle level
    connection.send((False, [value / (4 * numel) for value in _fit(replicas, numel, aggregation)]))


def _fit(replicas: int, numel: int, aggregation: str) -> list[float]:
    """Bytes: peak above idle while the stage opens and in later rounds, and what a round moves."""
    idle = _peak_from_here()
    with open_fake_fit(replicas, numel, aggregation=aggregation) as fit:
        opening = _status("VmHWM")
        _peak_from_here()
        moved = []
        for _ in range(ROUNDS):
            fit.round()
            moved.append(fit.record.sent_bytes + fit.record.received_bytes)
        return [opening - idle, _status("VmHWM") - idle, sum(moved) / ROUNDS]


def measure(*, pairs: int, quick: bool) -> dict[str, Any]:
    """Peaks above idle in a fresh process for every value."""
    cases = [(replicas, how) for how in AGGREGATIONS for replicas in REPLICAS]
    cases, numel, times = ([(2, "star")], NUMEL // 5, 1) if quick else (cases, NUMEL, min(pairs, 3))
    found: dict[tuple[int, str], list[list[float]]] = {case: [] for case in cases}
    for _ in range(times):
        for case in cases:
            process = Processes(_driver, 1, case[0], numel, case[1])
            try:
                found[case].append(process.answers()[0])
            finally:
                process.kill()
    titles = ("peak while the stage opens", "peak in rounds", "moved a round")
    units = ("P, memory", "P, memory", "P, bytes")
    rows = [
        row(
            f"{replicas} replicas, {how}: {title}",
            unit,
            [values[i] for values in found[replicas, how]],
            series=f"{title}, {how}",
            x=replicas,
        )
        for i, (title, unit) in enumerate(zip(titles, units, strict=True))
        for replicas, how in cases
    ]
    return {
        "title": "The driver's memory and traffic",
        "x_title": "replicas",
        "rows": rows,
        "notes": [
            (
                f"P = {4 * numel / 1e6:g} MB of parameters, Assign; a fit in a fresh driver process (no Spark) with replicas "
                "that take no steps. Memory: resident, above that before the model was made and after a fit of a tiny one; the "
                "user's model on the driver is one P of it. Bytes at the driver, both ways, frames included."
            )
        ],
    }
