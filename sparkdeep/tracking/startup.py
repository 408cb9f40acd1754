"""What a fit costs before its first step, by phase."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from sparkdeep.tracking.records import RoundRecord

__all__ = ["Phases", "StartUp"]

_LOG = logging.getLogger("sparkdeep")


@dataclass(frozen=True, kw_only=True)
class StartUp:
    """Seconds from the call of `fit` to the first local step."""

    checks_s: float
    """Settings, session, free slots, schema, and building the model on the driver."""
    ingest_s: float
    """Rows to shards, Python workers that start for it included."""
    rehearsal_s: float
    """The first rows through the model on the driver, and packing it."""
    opening_s: float
    """Reading checkpoints, calling callbacks, opening the first stage: tasks launched, replicas built, parameters sent."""

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.checks_s + self.ingest_s + self.rehearsal_s + self.opening_s

    def __str__(self) -> str:
        """One line for a log."""
        return (
            f"{self.total_s:.2f} s before the first step: checks {self.checks_s:.2f}, ingest {self.ingest_s:.2f}, rehearsal "
            f"{self.rehearsal_s:.2f}, opening the first stage {self.opening_s:.2f}"
        )


@final
class Phases:
    """The clock of one fit's start; it listens to the rounds for the first of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        self._seconds: dict[str, float] = {}
        self.startup: StartUp | None = None
        """None until the first round is done, and for a fit that has no rounds left."""

    def end(self, phase: str) -> None:
        """End the phase that began when the last one ended: "checks", "ingest" or "rehearsal"."""
        now = self._clock()
        self._seconds[f"{phase}_s"] = now - self._last
        self._last = now

    def __call__(self, record: RoundRecord) -> Any:
        """Note a round: how long the first one took tells when it began."""
        if self.startup is None:
            opening_s = max(0.0, self._clock() - self._last - (record.seconds - record.stage_seconds))
            self.startup = StartUp(opening_s=opening_s, **self._seconds)
            _LOG.info("%s", self.startup)
