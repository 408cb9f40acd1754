"""One batch through the model and the loss, with row weights and label shapes as a user expects."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from sparkdeep.data.batches import Batch
from sparkdeep.errors import ConfigError
from sparkdeep.program import Program

__all__ = ["LossFunction", "forward"]


def forward(model: nn.Module, features: Tensor | dict[str, Tensor]) -> Any:
    """`model(x)` for one tensor, `model(**columns)` for named ones."""
    return model(**features) if isinstance(features, dict) else model(features)


class LossFunction:
    """The training loss of a batch, and its output where there is one.

    A torch loss module meets its usual trap here: for an output of shape (B, 1) and labels of shape (B,) it would
    broadcast to (B, B); the labels are viewed as (B, 1). Row weights w give `sum_i w_i l_i / sum_i w_i`.

    Raises:
        ConfigError: a weight column with a loss that cannot be had per row.
    """

    def __init__(self, program: Program, *, weighted: bool) -> None:
        self._step = program.training_step
        self._loss = program.loss
        self._per_row: Callable[..., Tensor] | None = None
        self._takes_weight = False
        if not weighted or self._step is not None:
            return
        if hasattr(program.loss, "reduction"):
            per_row: Any = copy.copy(program.loss)
            per_row.reduction = "none"
            self._per_row = per_row
        elif program.loss is not None and "weight" in inspect.signature(program.loss).parameters:
            self._takes_weight = True
        else:
            raise ConfigError(
                f"weight_col needs a loss per row, but {program.loss!r} has neither a `reduction` attribute (as torch's "
                "loss modules have) nor an argument `weight`. Use a torch.nn loss, write loss(output, label, weight), "
                "or use training_step(model, batch) with batch.weights."
            )

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar loss of `batch`: the mean over its rows, weighted where there are weights."""
        if self._step is not None:
            return self._step(model, batch)
        return self.of_output(forward(model, batch.features), batch)

    def of_output(self, output: Any, batch: Batch) -> Tensor:
        """The scalar loss for an output that is already there (validation computes it once)."""
        assert self._loss is not None
        labels = _aligned(self._loss, output, batch.labels)
        if batch.weights is None or (self._per_row is None and not self._takes_weight):
            return self._loss(output, labels)
        if self._takes_weight:
            return self._loss(output, labels, weight=batch.weights)
        assert self._per_row is not None
        per_row = self._per_row(output, labels)
        if per_row.dim() > 1:
            per_row = per_row.flatten(1).mean(1)
        total = batch.weights.sum()
        # A batch whose weights are all zero teaches nothing; its mean would be 0/0.
        return (per_row * batch.weights).sum() / torch.where(total > 0, total, torch.ones_like(total))


def _aligned(loss: Any, output: Any, labels: Any) -> Any:
    if (
        isinstance(loss, _Loss)
        and isinstance(output, Tensor)
        and isinstance(labels, Tensor)
        and labels.is_floating_point()
        and output.dim() == 2
        and output.shape == (labels.shape[0], 1)
        and labels.dim() == 1
    ):
        return labels.unsqueeze(1)
    return labels
