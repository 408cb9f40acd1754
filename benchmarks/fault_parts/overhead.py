"""What deadlines, digests and checks cost an undisturbed run: with and without them, in turn, on the same wire."""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from measuring.rows import over
from measuring.table import spread
from speed_parts.images import Images
from speed_parts.plain_replicas import plain_fit, write_shards
from torch import nn

from fault_parts.unguarded import GUARDS, replica, unguarded
from sparkdeep.models.program import Program
from sparkdeep.settings.run import LocalSettings, RunSettings

__all__ = ["run"]

_REPLICAS: Final = 2
_ROWS: Final = 8192
_WARM: Final = 5
TARGET: Final = 1.02


def _program() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return Program(model=model, loss=nn.CrossEntropyLoss(), optimizer=functools.partial(torch.optim.AdamW, lr=1e-3))


def _images() -> Images:
    chance = np.random.default_rng(0)
    pixels = chance.random((_ROWS, 784), dtype=np.float32)
    return Images(name="noise", pixels=pixels, labels=chance.integers(0, 10, _ROWS), train_rows=_ROWS)


class Contest:
    """One run with guards and one without stand open side by side, and take their rounds in turn.

    Args:
        folder: for shards.
        rounds: that each may be asked for.
        sync_every: local steps a round.
        batch_size: of each replica.
    """

    def __init__(self, folder: Path, *, rounds: int, sync_every: int, batch_size: int) -> None:
        self._stack = contextlib.ExitStack()
        steps = _ROWS // _REPLICAS // batch_size
        settings = RunSettings(
            num_workers=_REPLICAS,
            epochs=-(-rounds * sync_every // steps),
            sync_every=sync_every,
            rounds_per_stage=10**9,
            max_stage_s=3600.0,
            aggregation="star",
        )
        shards = write_shards(folder, _images(), _REPLICAS)
        local = LocalSettings(batch_size=batch_size)
        self.fits = {
            "with": self._stack.enter_context(plain_fit(_program(), local, settings, shards)),
            "without": self._stack.enter_context(plain_fit(_program(), local, settings, shards, target=replica)),
        }
        self._rounds = {name: fit.rounds() for name, fit in self.fits.items()}
        for rounds_of in self._rounds.values():
            self._stack.callback(rounds_of.close)

    def seconds(self, name: str, count: int) -> tuple[float, float]:
        """Of `count` rounds of the run `name`: on the clock, and of processors in the driver and its replicas."""
        with unguarded() if name == "without" else contextlib.nullcontext():
            busy, began = self._busy_s(name), time.perf_counter()
            for _ in range(count):
                next(self._rounds[name])
            return time.perf_counter() - began, self._busy_s(name) - busy

    def _busy_s(self, name: str) -> float:
        run = getattr(self.fits[name], "_run", None)  # there is none before the first round
        stage = run.replicas._stage if run is not None else None
        replicas = stage.hellos.values() if stage is not None else ()
        return time.process_time() + sum(_of_process_s(hello.pid) for hello in replicas)

    def close(self) -> None:
        """End both."""
        self._stack.close()


def _of_process_s(pid: int) -> float:
    """What a process has had of processors; the name in the second field may hold spaces."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _measured(*, pairs: int, each: int, sync_every: int, batch_size: int) -> dict[str, Any]:
    values: dict[str, list[float]] = {"with": [], "without": []}
    busy: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as name:
        contest = Contest(Path(name), rounds=_WARM + pairs * each + 1, sync_every=sync_every, batch_size=batch_size)
        with contextlib.closing(contest):
            for which in values:
                contest.seconds(which, _WARM)
            for pair in range(pairs):
                for which in ("with", "without") if pair % 2 == 0 else ("without", "with"):
                    clock_s, busy_s = contest.seconds(which, each)
                    values[which].append(clock_s / each)
                    busy[which].append(busy_s / each)
            a, b = (fit.state.parameters for fit in contest.fits.values())
            same = torch.equal(a, b)
    assert same, "both runs are the same work"
    return {
        "sync_every": sync_every,
        "batch_size": batch_size,
        "seconds": values,
        "processor_seconds": busy,
        "ratios": over(values["with"], values["without"]),
        "processor_ratios": over(busy["with"], busy["without"]),
    }


def run(*, pairs: int) -> dict[str, Any]:
    """Interleaved pairs at two lengths of a round; JSON-ready."""
    ordinary = _measured(pairs=pairs, each=10, sync_every=10, batch_size=64)
    shortest = _measured(pairs=pairs, each=40, sync_every=1, batch_size=64)
    lines, text = (
        [],
        [
            "| perceptron, 269,000 parameters | ms a round with | without | ratio | of processor time |",
            "|---|---|---|---|---|",
        ],
    )
    for what, one in (("10 steps a round", ordinary), ("1 step a round", shortest)):
        cells = [spread([1e3 * value for value in one["seconds"][which]]) for which in ("with", "without")]
        text.append(f"| {what} | {' | '.join(cells)} | {spread(one['ratios'])} | {spread(one['processor_ratios'])} |")
    whole = statistics.median(ordinary["ratios"])
    lines.append(
        [
            f"guards' share of an undisturbed run, 10 steps a round, at most {TARGET:g} ({pairs} pairs)",
            f"{spread(ordinary['ratios'])}; of processor time {spread(ordinary['processor_ratios'])}",
        ]
    )
    text += ["", "Without: " + "; ".join(what for _, _, _, what in GUARDS) + "; deadlines of reads and writes."]
    return {
        "title": "What guards cost",
        "lines": lines,
        "text": text,
        "failed": whole > TARGET,
        "result": {"ordinary": ordinary, "shortest": shortest},
    }
