"""The driver's Python memory in a fit, in multiples of the parameters, and the bytes it moves a round."""

from __future__ import annotations

import gc
import re
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from benchmarks.fake_replicas import ROWS, fake_launcher
from benchmarks.processes import Processes
from benchmarks.rows import row
from benchmarks.traffic import wire_bytes
from sparkdeep.config import LocalSettings, RunSettings
from sparkdeep.coordinator import Coordinator
from sparkdeep.fitting import Fit, new_run_id, plan_of
from sparkdeep.program import Program
from sparkdeep.stages import ShardFacts

__all__ = ["measure"]

REPLICAS: Final = (2, 4, 8)
ROUNDS: Final = 3
SIDE: Final = 5_000
"""One linear layer of SIDE x SIDE float32: 100 MB."""


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"no {field} in /proc/self/status"
    return 1024 * int(found[1])


def _peak_from_here() -> int:
    """Forget the peak so far; gives the resident bytes now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _driver(rank: int, connection: Connection, replicas: int, side: int) -> None:
    """A fresh driver: fits one linear layer with stand-ins, and tells of its peaks and its traffic in multiples of P."""
    del rank
    _fit(replicas, 16)  # what is loaded and started once is part of the idle level
    connection.send((False, [value / (4 * side * side) for value in _fit(replicas, side)]))


def _fit(replicas: int, side: int) -> list[float]:
    """Bytes: peak above idle while the stage opens and in later rounds, and what a round moves."""
    shards = [ShardFacts(rows=ROWS, digest="fake")] * replicas
    coordinator = Coordinator(bind_host="127.0.0.1", advertised_host="127.0.0.1", ports=range(1))
    with tempfile.TemporaryDirectory(prefix="sparkdeep-memory-") as states:
        idle = _peak_from_here()
        program = Program(model=nn.Linear(side, side, bias=False), loss=nn.MSELoss(), optimizer=torch.optim.SGD)
        local = LocalSettings(batch_size=1)
        fit = Fit(
            program=program,
            local=local,
            settings=RunSettings(num_workers=replicas, sync_every=1, rounds_per_stage=ROUNDS + 2),
            plan=plan_of(program, local, None),
            shards=shards,
            launcher=fake_launcher(replicas, side * side, states),
            coordinator=coordinator,
            run=new_run_id(),
        )
        rounds = fit.rounds()
        next(rounds)
        opening = _status("VmHWM")
        _peak_from_here()
        before = wire_bytes(coordinator.address.port)
        for _ in range(ROUNDS):
            next(rounds)
        moved = (wire_bytes(coordinator.address.port) - before) / ROUNDS
        peak = _status("VmHWM")
        rounds.close()
    coordinator.close()
    return [opening - idle, peak - idle, moved]


def measure(*, pairs: int, quick: bool) -> dict[str, Any]:
    """Peaks above idle in a fresh process for every value."""
    counts, side, times = ((2, 8), 3_200, 1) if quick else (REPLICAS, SIDE, min(pairs, 3))
    found: dict[int, list[list[float]]] = {replicas: [] for replicas in counts}
    for _ in range(times):
        for replicas in counts:
            process = Processes(_driver, 1, replicas, side)
            try:
                found[replicas].append(process.answers()[0])
            finally:
                process.kill()
    titles = ("peak while the stage opens", "peak in rounds", "moved a round, star")
    units = ("P, memory", "P, memory", "P, bytes")
    rows = [
        row(f"{replicas} replicas, {title}", unit, [values[i] for values in found[replicas]], series=title, x=replicas)
        for i, (title, unit) in enumerate(zip(titles, units, strict=True))
        for replicas in counts
    ]
    return {
        "title": "The driver's memory and traffic",
        "rows": rows,
        "notes": [
            (
                f"P = {4 * side * side / 1e6:g} MB of parameters, Assign; a fit in a fresh driver process (no Spark) with "
                "replicas that take no steps. Resident memory above that before the model was made, "
                "after a fit of a tiny one: the user's model on "
                "the driver is one P of it. Bytes as the kernel counts them on the driver's port, both ways."
            )
        ],
    }
