"""Loss against rows, bytes and seconds, a row of panels a part; needs matplotlib, the extra `benchmark`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from algorithm_parts.results import Run, by_name
from algorithm_parts.tables import TITLES

__all__ = ["mean_curve", "plot"]

_AXES: Final = {"rows": "rows trained on", "megabytes": "MB through the driver", "seconds": "s"}
_STYLES: Final = ("-", "--", ":")


def mean_curve(runs: Sequence[Run], axis: str) -> tuple[list[float], list[float]]:
    """Means over seeds, point by point, as far as the shortest curve goes: (axis, loss)."""
    columns = list(zip(*(run.curve for run in runs), strict=False))
    places = [statistics.mean(getattr(point, axis) for point in column) for column in columns]
    return places, [statistics.mean(point.loss for point in column) for column in columns]


def plot(parts: Mapping[str, Sequence[Run]], path: Path) -> bool:
    """Draw every part that has runs to `path`; whether there was anything to draw."""
    parts = {part: runs for part, runs in parts.items() if runs}
    if not parts:
        return False
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.4 * len(parts)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(parts), len(_AXES), squeeze=False, sharey="row")
    colors = colormaps["tab10"].colors
    for row, (part, runs) in zip(grid, parts.items(), strict=True):
        for axes, axis in zip(row, _AXES, strict=True):
            for number, (name, own) in enumerate(by_name(runs).items()):
                style = {"color": colors[number % 10], "linestyle": _STYLES[number // 10 % 3]}
                axes.plot(*mean_curve(own, axis), label=name, linewidth=1.2, **style)
            _dress(axes, axis)
        row[0].set_ylabel(f"{TITLES[part]}: held-out loss")
        row[-1].legend(fontsize="xx-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=62)
    return True


def _dress(axes: Any, axis: str) -> None:
    axes.set_xlabel(_AXES[axis])
    axes.set_yscale("log")
    if axis != "rows":
        axes.set_xscale("log")
        _mark(axes.xaxis)
    _mark(axes.yaxis)
    axes.grid(alpha=0.3, which="both")


def _mark(axis: Any) -> None:
    """Marks at 1, 2 and 5 of every decade: less than a decade has some, and many have room."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
