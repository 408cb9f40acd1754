"""A run whose loss explodes stops before the round that shows it counts: the last good checkpoint stays the newest."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparkdeep.config import RunSettings
from sparkdeep.errors import DivergedError
from sparkdeep.metrics import RoundRecord

__all__ = ["check_divergence"]


def check_divergence(loss: float, records: Sequence[RoundRecord], settings: RunSettings, round_number: int) -> None:
    """Refuse a round whose loss exceeds `divergence_factor` times the lowest so far.

    Args:
        loss: of the round; NaN where it has none.
        records: of the rounds before.
        settings: of the fit.
        round_number: of the round.

    Raises:
        DivergedError: naming the losses and the newest round with a checkpoint.
    """
    past = [record.loss for record in records if math.isfinite(record.loss)]
    if settings.divergence_factor is None or not past or min(past) <= 0 or math.isnan(loss):
        return
    if loss <= settings.divergence_factor * min(past):
        return
    kept = [record.round for record in records if record.checkpoint_bytes]
    newest = kept[-1] if kept else None
    raise DivergedError(
        f"round {round_number}: the loss is {loss:.6g}, more than divergence_factor={settings.divergence_factor:g} times the "
        f"lowest so far, {min(past):.6g}: the run diverges, and stopped before this round counted. "
        + (
            f"The newest checkpoint is of round {newest}: the same call with another learning rate or clip_grad_norm= in a new "
            "checkpoint_dir, and warm_start= the model saved from it, goes on."
            if newest is not None
            else "There is no checkpoint: set checkpoint_dir= to keep good rounds. Lower the learning rate, or set clip_grad_norm=."
        ),
        round_number=round_number,
        checkpoint=newest,
    )
