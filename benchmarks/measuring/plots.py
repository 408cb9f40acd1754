"""Sections as PNG plots; needs matplotlib, the optional extra `benchmark`."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

__all__ = ["can_plot", "plot_section"]

_WIDE: Final = 20  # a larger range of values is drawn on a logarithmic axis


def can_plot() -> str:
    """Why plots cannot be drawn, and what to do; empty when they can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plots were drawn: matplotlib is not installed (pip install 'sparkdeep[benchmark]')"
    return ""


def plot_section(section: Mapping[str, Any], path: Path) -> bool:
    """Draw a section's rows to `path`, a panel a unit: lines where rows have a place on one, else bars.

    Returns whether there was anything to draw. Whiskers reach from the least value to the most.
    """
    units = list(dict.fromkeys(row["unit"] for row in section["rows"]))
    if not units:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_unit = [[row for row in section["rows"] if row["unit"] == unit] for unit in units]
    heights = [3.6 if _on_lines(rows) else 0.6 + 0.34 * len(rows) for rows in by_unit]
    figure = Figure(figsize=(9, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(units), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, unit, rows in zip(grid[:, 0], units, by_unit, strict=True):
        if _on_lines(rows):
            _lines(axes, rows)
            axes.set_ylabel(unit)
            axes.set_xlabel(section.get("x_title", ""))
        else:
            _bars(axes, rows)
            axes.set_xlabel(unit)
    figure.suptitle(section["title"])
    figure.savefig(path, dpi=110)
    return True


def _on_lines(rows: Sequence[Mapping[str, Any]]) -> bool:
    return all("x" in row for row in rows)


def _whiskers(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[list[float]]]:
    medians = [statistics.median(row["values"]) for row in rows]
    below = [median - min(row["values"]) for median, row in zip(medians, rows, strict=True)]
    above = [max(row["values"]) - median for median, row in zip(medians, rows, strict=True)]
    return medians, [below, above]


def _bars(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    medians, whiskers = _whiskers(rows)
    axes.barh(range(len(rows)), medians, xerr=whiskers, color="#4878a8", ecolor="#333333", capsize=2)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def _lines(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for series in dict.fromkeys(row["series"] for row in rows):
        own = sorted((row for row in rows if row["series"] == series), key=lambda row: row["x"])
        medians, whiskers = _whiskers(own)
        axes.errorbar([row["x"] for row in own], medians, yerr=whiskers, marker="o", capsize=2, label=series)
    places = sorted({row["x"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    if max(max(row["values"]) for row in rows) > _WIDE * min(min(row["values"]) for row in rows):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)
