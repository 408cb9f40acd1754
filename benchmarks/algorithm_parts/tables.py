"""Runs as Markdown: a line a contender, means over seeds with their standard deviation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from algorithm_parts.results import Run, by_name

__all__ = ["TITLES", "against", "mean_sd", "part_table", "reached"]

TITLES: Final[Mapping[str, str]] = {
    "digits": "Digits",
    "mnist10k": "MNIST, 10,000 images",
    "mixed": "Mixed data",
    "text": "A character-level GPT",
    "speeds": "Replicas of different speeds",
}


def mean_sd(values: Sequence[float], digits: int) -> str:
    """The mean, with the standard deviation of a sample where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _amount(values: Sequence[float]) -> str:
    median = statistics.median(values)
    if median >= 100:
        return f"{median:,.0f}"
    return f"{median:.1f}" if median >= 10 else f"{median:.2g}"


def part_table(part: str, runs: Sequence[Run], order: Sequence[str] = ()) -> str:
    """A part as one table: scores as means, rounds, rows, bytes and seconds as medians over seeds.

    Args:
        part: of the job.
        runs: of it.
        order: of contenders; others come after them.
    """
    scored = any(run.last.accuracy is not None for run in runs)
    titles = ["algorithm", *(["accuracy"] if scored else []), "loss", "rounds", "rows", "MB", "s", "seeds", "settings"]
    lines = [f"## {TITLES[part]}", "", f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    found = by_name(runs)
    for name in [*(one for one in order if one in found), *(one for one in found if one not in order)]:
        own = found[name]
        right = [run.last.accuracy for run in own if run.last.accuracy is not None]
        cells = [
            name,
            *([mean_sd(right, 4)] if right else [""] * scored),
            mean_sd([run.last.loss for run in own], 3),
            _amount([run.rounds for run in own]),
            _amount([run.last.rows for run in own]),
            _amount([run.last.megabytes for run in own]),
            _amount([run.last.seconds for run in own]),
            str(len(own)),
            own[-1].settings,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def reached(run: Run, target: float, of: Callable[[Run, int], float]) -> float | None:
    """Where a run's loss first is at most `target`: `of(run, place on the curve)`; None: nowhere."""
    for place, point in enumerate(run.curve):
        if point.loss <= target:
            return of(run, place)
    return None


def against(runs: Sequence[Run], name: str, reference: str) -> list[float]:
    """Last losses of a contender over those of another, less one, by seeds that both have."""
    found = {(run.name, run.seed): run.last.loss for run in runs}
    seeds = sorted({run.seed for run in runs})
    return [
        found[name, seed] / found[reference, seed] - 1
        for seed in seeds
        if (name, seed) in found and (reference, seed) in found
    ]
