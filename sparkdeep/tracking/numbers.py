"""A round's record as named numbers, the same for every tracker."""

from __future__ import annotations

from typing import Final

from sparkdeep.metrics import RoundRecord

__all__ = ["PHASES", "numbers_of"]

PHASES: Final = ("compute", "exchange", "outer", "stage", "validation", "checkpoint")
"""Of a round's time; field `NAME_seconds` of the record."""


def numbers_of(record: RoundRecord) -> dict[str, float]:
    """Loss, validation scores, speed and seconds by phase; a round without validation has no such scores."""
    scores = {f"validation/{name}": value for name, value in record.metrics.items()}
    phases = {f"seconds/{phase}": float(getattr(record, f"{phase}_seconds")) for phase in PHASES}
    return {
        "loss": record.loss,
        **scores,
        "rows_per_second": record.rows_per_second,
        "epoch": float(record.epoch),
        "retries": float(record.retries),
        "seconds/round": record.seconds,
        **phases,
    }
