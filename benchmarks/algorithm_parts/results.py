"""What was measured, a line of JSON a run, so that tables can be made of several runs of the job."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

__all__ = ["Point", "Run", "append", "by_name", "read"]


@final
@dataclass(frozen=True, kw_only=True)
class Point:
    """A model that was scored on the way."""

    rows: int
    """Trained on so far, by all replicas together."""
    megabytes: float
    """Through the driver so far, both ways."""
    seconds: float
    """Of rounds so far, without scoring and without opening the stage."""
    loss: float
    """Of rows that are not trained on."""
    accuracy: float | None = None
    """Of the same; None where there is none."""


@final
@dataclass(frozen=True, kw_only=True)
class Run:
    """One contender with one seed."""

    part: str
    """"digits", "mnist10k", "mixed", "text" or "speeds"."""
    name: str
    """The contender's."""
    seed: int
    rounds: int
    settings: str
    """What was chosen for it, to read."""
    curve: Sequence[Point]
    """The last is the result."""

    @property
    def last(self) -> Point:
        """The trained model."""
        return self.curve[-1]


def append(run: Run, folder: Path) -> None:
    """Add a run to `folder`/`part`.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{run.part}.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(dataclasses.asdict(run)) + "\n")


def read(folder: Path, part: str) -> list[Run]:
    """The runs of a part; of the same contender and seed, the newest. None where there is no file."""
    path = folder / f"{part}.jsonl"
    if not path.exists():
        return []
    newest: dict[tuple[str, int], Run] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        run = Run(**{**values, "curve": [Point(**point) for point in values["curve"]]})
        newest[run.name, run.seed] = run
    return list(newest.values())


def by_name(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of each contender, in the order in which they came."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.name, []).append(run)
    return found
