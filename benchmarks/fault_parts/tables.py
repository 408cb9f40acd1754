"""What the parts found as Markdown, and what becomes of a row when its tests have run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fault_parts.catalogue import Row, phases_in

__all__ = ["counted", "matrix_table", "summary_table", "verdicts", "whole_text"]


def verdicts(rows: Sequence[Row], lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What became of every row: passed when all of its tests did, and at least one was not skipped.

    Args:
        rows: of the catalogue.
        lines: what `pytest_rows` wrote.
    """
    return [_verdict(row, [line for line in lines if row.number in line["rows"]]) for row in rows]


def _verdict(row: Row, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    failed = [line for line in lines if line["outcome"] == "failed"]
    passed = [line for line in lines if line["outcome"] == "passed"]
    skipped = [line for line in lines if line["outcome"] == "skipped"]
    shown = {phase for line in passed for phase in phases_in(line["phases"][str(row.number)])}
    if failed:
        verdict, why = "FAILED", "; ".join(f"{line['test']}: {_last_line(line['reason'])}" for line in failed)
    elif passed:
        verdict, why = "passed", ""
    elif skipped:
        verdict, why = "not run", "; ".join(sorted({_last_line(line["reason"]) for line in skipped}))
    else:
        verdict, why = "not run", "no test of the tiers that were run carries it"
    return {
        "number": row.number,
        "fault": row.fault,
        "expected": row.expected,
        "verdict": verdict,
        "why": why,
        "on": sorted({line["tier"] for line in passed if "tier" in line}),
        "shown": sorted(shown),
        "open": [phase for phase in row.phases if phase not in shown],
        "tests": len({line["test"] for line in lines}),
        "seconds": round(sum(line["seconds"] for line in lines), 1),
    }


def _last_line(text: str) -> str:
    words = [line.strip() for line in text.splitlines() if line.strip()]
    return words[-1][:200] if words else ""


def counted(lines: Sequence[Mapping[str, Any]], what: str) -> dict[str, int]:
    """The sums of what tests counted under "`what`: name"."""
    sums: dict[str, int] = {}
    for line in lines:
        for name, value in line["counted"].items():
            head, _, target = name.partition(": ")
            if head == what:
                sums[target or what] = sums.get(target or what, 0) + value
    return sums


def matrix_table(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """The matrix as a table."""
    text = ["| # | fault | shown in | on | result | tests | s |", "|---|---|---|---|---|---|---|"]
    for one in verdicts:
        phases = " ".join(one["shown"]) or "-"
        if one["open"] and one["shown"]:
            phases += f" (not {' '.join(one['open'])})"
        result = one["verdict"] + (f": {one['why']}" if one["why"] else "")
        text.append(
            f"| {one['number']} | {one['fault']} | {phases} | {' '.join(one['on'])} | {result} | {one['tests']} | {one['seconds']:g} |"
        )
    return "\n".join(text) + "\n"


def summary_table(parts: Sequence[Mapping[str, Any]]) -> str:
    """Few lines for docs/results/faults.md: what was tried, and what came of it."""
    text = ["| what | result |", "|---|---|"]
    for part in parts:
        text += [f"| {what} | {result} |" for what, result in part["lines"]]
    return "\n".join(text) + "\n"


def whole_text(headline: str, parts: Sequence[Mapping[str, Any]]) -> str:
    """Everything: the summary, then each part."""
    text = [headline, "", summary_table(parts)]
    for part in parts:
        text += [f"## {part['title']}", "", f"{part['seconds']:g} s", "", *part.get("text", [])]
    return "\n".join(text).rstrip() + "\n"
