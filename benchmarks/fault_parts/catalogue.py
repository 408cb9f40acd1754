"""The rows of the fault matrix as values, read from `benchmarks/fault_parts/matrix.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["PHASES", "Row", "phases_in", "read_rows"]

PHASES: Final = {
    "PF": "preflight",
    "SL": "waiting for slots",
    "LD": "loading",
    "TR": "training",
    "RT": "an update on its way",
    "AV": "averaging",
    "CK": "writing a checkpoint",
    "CM": "its commit",
    "BT": "between rounds",
    "RS": "resuming",
    "TF": "transform",
}
_FILE: Final = Path(__file__).resolve().with_name("matrix.toml")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that can go wrong."""

    number: int
    """As tests carry it in `@pytest.mark.fault(rows=[...])`."""
    fault: str
    phases: tuple[str, ...]
    """In which it must be shown."""
    expected: str


def read_rows() -> list[Row]:
    """All rows, in order."""
    content = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return [Row(**{**row, "phases": tuple(row["phases"])}) for row in content["row"]]


def phases_in(text: str) -> list[str]:
    """The phases that a mark names: "TR", or several by comma or space.

    Raises:
        ValueError: a phase that there is not.
    """
    named = text.replace(",", " ").split()
    if unknown := [phase for phase in named if phase not in PHASES]:
        raise ValueError(f"phases={text!r}: {unknown[0]!r} is none of {', '.join(PHASES)}.")
    return named
