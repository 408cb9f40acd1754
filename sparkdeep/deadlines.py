"""How long a round may take: a multiple of what the rounds before it took."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

from sparkdeep.metrics import RoundRecord

__all__ = ["round_deadline_s"]

_FACTOR: Final = 10.0
_LOOKED_AT: Final = 50


def round_deadline_s(records: Sequence[RoundRecord], floor_s: float) -> float | None:
    """Seconds after which a round counts as hung; None for the first, of which nothing is known but that it makes progress.

    Args:
        records: of the run so far; the last fifty are looked at.
        floor_s: the least that is given.
    """
    past = [record.compute_seconds + record.exchange_seconds for record in records[-_LOOKED_AT:]]
    return max(floor_s, _FACTOR * statistics.median(past)) if past else None
