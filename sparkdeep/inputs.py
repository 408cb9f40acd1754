"""A batch's features on their way to the model: `preprocess` always, `augment` in training."""

from __future__ import annotations

from dataclasses import replace

from sparkdeep.data.batches import Batch
from sparkdeep.program import Program

__all__ = ["prepared"]


def prepared(batch: Batch, program: Program, *, augment: bool) -> Batch:
    """Apply `preprocess`, and in training `augment`, to a batch's features."""
    features = batch.features
    if program.preprocess is not None:
        features = program.preprocess(features)
    if augment and program.augment is not None:
        features = program.augment(features)
    if features is batch.features:
        return batch
    return replace(batch, features=features)
