"""What a mean loss was divided by: torch's means over labels divide by the labels that count, and not by rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["BatchLoss", "Count", "DenominatorWatch", "count_labels", "label_counts", "number_of", "stated"]

Count: TypeAlias = "float | Tensor"
"""A number, or on a device a tensor of one, which is not waited for before it is needed."""


@final
@dataclass(frozen=True)
class BatchLoss:
    """The loss of a batch, as it is differentiated, and what it was divided by.

    A mean over several batches, replicas or rounds is the sum of `mean * count` over the sum of `count`: it is divided once.
    """

    mean: Tensor
    """Of one element; NaN is no fault where `count` is 0, as all rows were left out."""
    count: Count
    """Rows, their weights, or what the loss counts in their place (labels that are not ignored, their classes' weights)."""


def number_of(count: Count) -> float:
    """A count as a number; waits for the device that it is on."""
    return float(count)


def label_counts(labels: Tensor, weight: Tensor | None, ignore_index: int | None) -> Tensor | None:
    """How much each label counts in torch's mean over class labels, in their shape; None: all the same.

    Args:
        labels: whole numbers of classes; probabilities of classes count alike.
        weight: (classes,), of the loss.
        ignore_index: of the loss; None ignores none.
    """
    if labels.is_floating_point():
        return None
    counted = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    if weight is None:
        return counted
    return weight[labels.long().masked_fill(~counted, 0)] * counted


def count_labels(labels: Tensor, weight: Tensor | None, ignore_index: int | None) -> Count:
    """What torch's mean over class labels divides by; see `label_counts`. Of probabilities of classes, (N, C, ...): N * ..."""
    if labels.is_floating_point():
        return float(labels.numel() // labels.shape[min(1, labels.dim() - 1)])
    if weight is None and labels.device.type == "cpu":  # in every step of most fits: numpy is twice as fast at it
        return float(labels.numel() if ignore_index is None else np.count_nonzero(labels.numpy() != ignore_index))
    counts = label_counts(labels, weight, ignore_index)
    assert counts is not None
    total = counts.sum(dtype=torch.float64)
    return float(total) if total.device.type == "cpu" else total


# Where their labels, the weights of classes and ignore_index stand among the arguments.
_MEANS_OVER_LABELS: Final[dict[Callable[..., Any], tuple[int, int, int, int | None]]] = {
    F.cross_entropy: (1, 2, 4, -100),
    F.nll_loss: (1, 2, 4, -100),
}
if hasattr(F, "linear_cross_entropy"):  # since torch 2.13
    _MEANS_OVER_LABELS[F.linear_cross_entropy] = (2, 99, 99, None)


@final
class DenominatorWatch(TorchFunctionMode):
    """Notes what torch's means over labels divide by, wherever a loss or a network calls them.

    What is computed under `no_grad` in the midst of training is no part of the loss, and is not noted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._grad = torch.is_grad_enabled()
        self.counts: list[Count] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func`."""
        del types
        result = func(*args, **(kwargs or {}))
        if func in _MEANS_OVER_LABELS and torch.is_grad_enabled() == self._grad:
            self._note(_MEANS_OVER_LABELS[func], args, kwargs or {})
        return result

    def _note(self, places: tuple[int, int, int, int | None], args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        def given(name: str, place: int, default: Any = None) -> Any:
            return args[place] if place < len(args) else named.get(name, default)

        if given("reduction", 6, "mean") != "mean":
            return
        labels, weight = given("target", places[0]), given("weight", places[1])
        self.counts.append(count_labels(labels, weight, given("ignore_index", places[2], places[3])))

    def count(self) -> Count | None:
        """What the loss divided by; None where torch's means over labels have no part in it, or several that differ."""
        if not self.counts:
            return None
        first, *others = self.counts
        return first if all(number_of(other) == number_of(first) for other in others) else None


def stated(value: Any) -> BatchLoss | None:
    """The loss that a user's function returned as (sum, count); None where it returned something else."""
    if not (isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor)):
        return None
    total, count = value
    if isinstance(count, Tensor) and count.device.type != "cpu":
        count = count.detach()
        return BatchLoss(total / torch.where(count > 0, count, 1), count)
    count = float(count)
    return BatchLoss(total / count if count > 0 else total * 0.0, count)
