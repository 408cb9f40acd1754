"""Interleaved measurements, and the JSON-ready rows that sections hand over."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["interleaved", "median_of", "over", "row"]


def interleaved(measures: Mapping[str, Callable[[], float]], pairs: int) -> dict[str, list[float]]:
    """Take every measurement once a pair, `pairs` times; gives the values by name, in order.

    Every other pair runs backwards, so that a drift of the machine favors nobody.
    """
    values: dict[str, list[float]] = {name: [] for name in measures}
    for pair in range(pairs):
        for name in list(measures) if pair % 2 == 0 else reversed(list(measures)):
            values[name].append(measures[name]())
    return values


def over(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """The ratios within pairs."""
    return [value / other for value, other in zip(values, others, strict=True)]


def row(
    name: str,
    unit: str,
    values: Sequence[float],
    *,
    ratios: Mapping[str, Sequence[float]] | None = None,
    series: str = "",
    x: float | None = None,
) -> dict[str, Any]:
    """One line of a section.

    Args:
        name: what was measured.
        unit: of the values.
        values: one a pair.
        ratios: by what the values are compared with, one ratio a pair.
        series: the line of the plot that this row's median is a point of.
        x: where on that line.
    """
    made: dict[str, Any] = {"name": name, "unit": unit, "values": list(values)}
    made["ratios"] = {against: list(ratio) for against, ratio in (ratios or {}).items()}
    if x is not None:
        made |= {"series": series, "x": x}
    return made


def median_of(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """The median of the row called `name`."""
    return float(statistics.median(next(row["values"] for row in rows if row["name"] == name)))
