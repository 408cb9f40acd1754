"""Sections as Markdown: median (least to most)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["headline", "section_table", "spread"]


def spread(values: Sequence[float]) -> str:
    """The median, with the least and the most where there are several; three digits, or whole from 1,000 on."""
    median = statistics.median(values)
    if len(values) == 1:
        return _digits(median)
    return f"{_digits(median)} ({_digits(min(values))} to {_digits(max(values))})"


def _digits(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def section_table(section: Mapping[str, Any]) -> str:
    """A section as Markdown: its title, one table, its notes."""
    lines = [f"## {section['title']}", ""]
    if section["rows"]:
        lines += ["| what | unit | median (least to most) | against | ratio |", "|---|---|---|---|---|"]
    for row in section["rows"]:
        ratios = list(row.get("ratios", {}).items()) or [("", None)]
        for place, (against, ratio) in enumerate(ratios):
            cells = [row["name"], row["unit"], spread(row["values"])] if place == 0 else ["", "", ""]
            cells += [against, "" if ratio is None else spread(ratio)]
            lines.append("| " + " | ".join(cells) + " |")
    for note in section["notes"]:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def headline(about: Mapping[str, Any]) -> str:
    """Hardware, versions, commit and date as one line."""
    parts = [str(about["date"]), str(about["cpu"]), f"{about['cores']} cores", f"{about['memory_gb']} GB"]
    parts += [f"{name} {about[name]}" for name in ("python", "torch", "pyspark", "pyarrow", "numpy", "commit")]
    return ", ".join(parts)
