"""How far a replica is in its part of a round, and what its losses were."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

__all__ = ["Progress"]

BEAT_S = 0.5


@final
class Progress:
    """Counts of a round as it goes on.

    Args:
        beat: called with (rows, steps), at most every half second.
    """

    def __init__(self, beat: Callable[[int, int], None]) -> None:
        self.rows = 0
        self.steps = 0
        self.weight = 0.0
        self.input_s = 0.0
        self._losses: list[Tensor | float] = []
        self._weights: list[float] = []
        self._beat = beat
        self._last = time.monotonic()

    def add(self, rows: int, weight: float, loss: Tensor | None) -> None:
        """Count a batch."""
        self.rows += rows
        self.weight += weight
        if loss is not None:
            # A number on the CPU is there; one on a device would be waited for, and is fetched when the round ends.
            self._losses.append(loss.item() if loss.device.type == "cpu" else loss.detach().reshape(()))
            self._weights.append(weight)
        if time.monotonic() - self._last > BEAT_S:
            self._beat(self.rows, self.steps)
            self._last = time.monotonic()

    def end_step(self) -> None:
        """Count a local step."""
        self.steps += 1

    def loss_sum(self) -> float:
        """Sum over batches of loss times weight."""
        numbers = [loss for loss in self._losses if not isinstance(loss, Tensor)]
        tensors = [loss for loss in self._losses if isinstance(loss, Tensor)]
        losses = (
            torch.stack(tensors).to("cpu", torch.float64) if tensors else torch.tensor(numbers, dtype=torch.float64)
        )
        return float(losses @ torch.tensor(self._weights, dtype=torch.float64))
