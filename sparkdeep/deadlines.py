"""How long a round may take: a multiple of what the rounds before it took."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

from sparkdeep.metrics import RoundRecord

__all__ = ["round_deadline_s"]

_FACTOR: Final = 10.0
_LOOKED_AT: Final = 50


def round_deadline_s(records: Sequence[RoundRecord], floor_s: float, num_steps: int = 0) -> float | None:
    """Seconds after which a round counts as hung; None for the first, of which nothing is known but that it makes progress.

    Args:
        records: of the run so far; the last fifty are looked at.
        floor_s: the least that is given.
        num_steps: local steps of the round, where its length is known and may be another than before: one with more steps
            than those before it is given as much more.
    """
    last = records[-_LOOKED_AT:]
    if not last:
        return None
    usual = statistics.median(record.compute_seconds + record.exchange_seconds for record in last)
    steps = statistics.median(max((part.steps for part in record.replicas), default=0) for record in last)
    return max(floor_s, _FACTOR * usual * max(1.0, num_steps / max(steps, 1)))
