"""Charts as data for a template: points, bars and ticks on a plane of 1000 by 300, and the words for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

__all__ = ["HEIGHT", "WIDTH", "Chart", "Line", "line_chart", "seconds", "short", "stacked_bars"]

WIDTH: Final = 1000.0
HEIGHT: Final = 300.0
"""The plane is stretched to the chart's size in the page; labels stand beside it, and so keep their size."""

_MOST_POINTS: Final = 800
_MOST_BARS: Final = 120
_MOST_HINTS: Final = 200
_DOTS_UP_TO: Final = 60
_LOG_FROM: Final = 50.0

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart; NaN and infinite values leave gaps."""

    name: str
    color: str
    """CSS class that holds its color."""
    points: Sequence[Point]
    """(round, value), rounds ascending."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart, ready to be drawn by the template. Ticks are (percent from the left or the top, text)."""

    title: str
    label: str
    """The chart in words, for readers who cannot see it."""
    x_ticks: Sequence[tuple[float, str]] = ()
    y_ticks: Sequence[tuple[float, str]] = ()
    legend: Sequence[tuple[str, str]] = ()
    """(color, name)"""
    paths: Sequence[tuple[str, str]] = ()
    """(color, SVG path) of lines."""
    dots: Sequence[tuple[str, str]] = ()
    """(color, SVG path) of zero-length lines, whose round ends are dots."""
    bars: Sequence[tuple[str, float, float, float, float]] = ()
    """(color, x, y, width, height)"""
    hints: Sequence[tuple[float, float, str]] = ()
    """(x, width, text) of what is shown under the pointer."""
    notes: Sequence[str] = field(default_factory=list)
    """Sentences below."""


def line_chart(title: str, lines: Sequence[Line], *, shown: Callable[[float], str]) -> Chart:
    """Lines over rounds; the scale is logarithmic where the greatest value is at least fifty times the least.

    Args:
        title: of the chart.
        lines: one or more; each may be empty.
        shown: a value as text.
    """
    values = [y for line in lines for _, y in line.points if math.isfinite(y)]
    rounds = sorted({x for line in lines for x, _ in line.points})
    if not rounds:
        return Chart(title=title, label=f"{title}: no rounds.")
    place_x = _across(rounds[0], rounds[-1])
    place_y, y_ticks, logarithmic = _scale(values, shown)
    paths, dots = [], []
    for line in lines:
        for run in _unbroken(_thinned(line.points)):
            placed = [(place_x(x), place_y(y)) for x, y in run]
            if len(placed) > 1:
                paths.append((line.color, "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)))
            if len(placed) == 1 or len(line.points) <= _DOTS_UP_TO:
                dots.append((line.color, "".join(f"M{x:.1f} {y:.1f}h.01" for x, y in placed)))
    notes = ["The scale is logarithmic."] if logarithmic else []
    notes += [note for line in lines if (note := _gaps(line, single=len(lines) == 1))]
    return Chart(
        title=title,
        label=f"{title} by round. " + " ".join(_in_words(line, shown) for line in lines),
        x_ticks=_round_ticks(rounds, place_x),
        y_ticks=y_ticks,
        legend=[(line.color, line.name) for line in lines],
        paths=paths,
        dots=dots,
        hints=_hints(lines, rounds, place_x, shown),
        notes=notes,
    )


def stacked_bars(
    title: str, rounds: Sequence[float], parts: Sequence[tuple[str, str, Sequence[float]]], *, label: str
) -> Chart:
    """Seconds by round, stacked; of many rounds, neighboring ones share a bar, which is their mean.

    Args:
        title: of the chart.
        rounds: one or more.
        parts: (color, name, seconds in each round), from below.
        label: the chart in words.
    """
    size = math.ceil(len(rounds) / _MOST_BARS)
    groups = [range(i, min(i + size, len(rounds))) for i in range(0, len(rounds), size)]
    heights = [[_mean([_finite(values[i]) for i in group]) for _, _, values in parts] for group in groups]
    place_y, y_ticks, _ = _scale([0.0, *(sum(stack) for stack in heights)], seconds)
    width = WIDTH / len(groups)
    gap = width * 0.12
    bars, hints = [], []
    for i, (group, stack) in enumerate(zip(groups, heights, strict=True)):
        base, words = 0.0, []
        for (color, name, _), height in zip(parts, stack, strict=True):
            if height > 0:
                top, bottom = place_y(base + height), place_y(base)
                bars.append((color, round(i * width + gap / 2, 2), round(top, 2), round(width - gap, 2), bottom - top))
                words.append(f"{name} {seconds(height)}")
                base += height
        first, last = rounds[group[0]], rounds[group[-1]]
        what = f"Round {first:g}" if first == last else f"Rounds {first:g} to {last:g}, mean"
        hints.append((i * width, width, f"{what}: {', '.join(words)}"))
    return Chart(
        title=title,
        label=label,
        x_ticks=_round_ticks(rounds, lambda x: (_index(rounds, x) / size + 0.5) * width),
        y_ticks=y_ticks,
        legend=[(color, name) for color, name, values in parts if any(_finite(v) > 0 for v in values)],
        bars=bars,
        hints=hints,
        notes=[f"Each bar is the mean of {size} rounds."] if size > 1 else [],
    )


def short(value: float) -> str:
    """A number in few characters: 0.02824, 12.5, 1,006, 101.5k."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite" if value > 0 else "-infinite"
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[unit]:,.4g}{unit}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}" if size >= 0.001 or not size else f"{value:.1e}"


def seconds(value: float) -> str:
    """A duration in few characters: 850 µs, 59 ms, 4.2 s, 3 min 20 s, 2 h 5 min."""
    if not math.isfinite(value):
        return "NaN"
    if value < 0.001:
        return f"{1e6 * value:.0f} µs" if value else "0 s"
    if value < 0.9995:
        return f"{1000 * value:.3g} ms"
    if value < 59.95:
        return f"{value:.3g} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _across(first: float, last: float) -> Callable[[float], float]:
    if first == last:
        return lambda _: WIDTH / 2
    # A little room on both sides, so that the first and last dot are whole.
    return lambda x: WIDTH * (0.01 + 0.98 * (x - first) / (last - first))


def _scale(
    values: Sequence[float], shown: Callable[[float], str]
) -> tuple[Callable[[float], float], list[tuple[float, str]], bool]:
    """A function from a value to its place, the ticks, and whether the scale is logarithmic."""
    values = [value for value in values if math.isfinite(value)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    logarithmic = low > 0 and high / low >= _LOG_FROM
    if logarithmic:
        ticks = _decades(low, high)
        low, high = min(low, ticks[0]), max(high, ticks[-1])
        span = math.log(high / low)
        place = lambda y: HEIGHT * (0.97 - 0.94 * math.log(y / low) / span)  # noqa: E731
    else:
        if low == high:
            low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
        ticks = _round_numbers(low, high)
        low, high = min(low, ticks[0]), max(high, ticks[-1])
        bottom = 1.0 if low == 0 else 0.97  # bars stand on the ground
        place = lambda y: HEIGHT * (bottom - (bottom - 0.03) * (y - low) / (high - low))  # noqa: E731
    return place, [(100 * place(tick) / HEIGHT, shown(tick)) for tick in ticks], logarithmic


def _round_numbers(low: float, high: float, about: int = 4) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from at most `low` to at least `high`."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [10.0**power for power in powers[:: max(1, math.ceil(len(powers) / 6))]]


def _round_ticks(rounds: Sequence[float], place: Callable[[float], float]) -> list[tuple[float, str]]:
    first, last = rounds[0], rounds[-1]
    ticks = {first, last}
    if last - first >= 4:
        inner = [t for t in _round_numbers(first, last) if t == int(t)]
        room = (last - first) * 0.12
        ticks |= {t for t in inner if first + room < t < last - room}
    return [(place(tick) * 100 / WIDTH, f"{tick:.0f}") for tick in sorted(ticks)]


def _index(rounds: Sequence[float], at: float) -> int:
    return min(range(len(rounds)), key=lambda i: abs(rounds[i] - at))


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most about `_MOST_POINTS`: of each stretch the least, the greatest, and any that is not finite."""
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    if size <= 2:
        return list(points)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [point for point in stretch if math.isfinite(point[1])]
        ends = {min(finite, key=_value), max(finite, key=_value)} if finite else set()
        holes = [point for point in stretch if not math.isfinite(point[1])][:1]
        kept += sorted([*ends, *holes])
    return kept


def _value(point: Point) -> float:
    return point[1]


def _unbroken(points: Iterable[Point]) -> list[list[Point]]:
    runs: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append((x, y))
        else:
            runs.append([])
    return [run for run in runs if run]


def _hints(
    lines: Sequence[Line], rounds: Sequence[float], place: Callable[[float], float], shown: Callable[[float], str]
) -> list[tuple[float, float, str]]:
    tables = [(line.name, dict(line.points)) for line in lines]
    told = list(rounds[:: math.ceil(len(rounds) / _MOST_HINTS)])
    middles = [0.0, *((place(a) + place(b)) / 2 for a, b in itertools.pairwise(told)), WIDTH]
    return [
        (
            left,
            right - left,
            f"Round {x:g}: " + ", ".join(f"{name} {shown(table[x])}" for name, table in tables if x in table),
        )
        for x, (left, right) in zip(told, itertools.pairwise(middles), strict=True)
    ]


def _in_words(line: Line, shown: Callable[[float], str]) -> str:
    finite = [point for point in line.points if math.isfinite(point[1])]
    if not finite:
        return f"{line.name}: no number."
    (first, began), (last, ended) = finite[0], finite[-1]
    low, high = min(finite, key=_value), max(finite, key=_value)
    return (
        f"{line.name}: {shown(began)} in round {first:g}, {shown(ended)} in round {last:g}; "
        f"least {shown(low[1])} in round {low[0]:g}, most {shown(high[1])} in round {high[0]:g}."
    )


def _gaps(line: Line, *, single: bool) -> str:
    holes = [x for x, y in line.points if not math.isfinite(y)]
    if not holes:
        return ""
    named = ", ".join(f"{x:g}" for x in holes[:8]) + (f" and {len(holes) - 8} more" if len(holes) > 8 else "")
    which = f"No finite number in round{'s' if len(holes) > 1 else ''} {named}"
    return f"{which}." if single else f"{which} ({line.name})."


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
