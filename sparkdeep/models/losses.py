"""One batch through the model and the loss, with row weights and label shapes as a user expects them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.loss import _Loss
from torch.overrides import TorchFunctionMode

from sparkdeep.data.batches import Batch
from sparkdeep.errors import ConfigError
from sparkdeep.models.denominators import BatchLoss, Count, DenominatorWatch, count_labels, label_counts, stated
from sparkdeep.models.program import Program

__all__ = ["BroadcastWatch", "LossFunction", "forward", "logits_of", "single_row_norms"]


def logits_of(output: Any) -> Any:
    """The logits of an output with several named parts, as transformers' models have; any other output as it is."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else output


def forward(model: nn.Module, features: Tensor | dict[str, Tensor]) -> Any:
    """`model(x)` for one tensor, `model(**columns)` for named ones."""
    return model(**features) if isinstance(features, dict) else model(features)


class LossFunction:
    """The training loss of a batch, and what it was divided by.

    torch's loss modules have a well-known trap: an output of shape (B, 1) and labels of shape (B,) broadcast to (B, B).
    Here the labels are viewed as (B, 1). Row weights w give `sum_i w_i l_i / sum_i w_i`, and where elements count
    differently in torch's own mean (class weights, `ignore_index`), they do so here: weights of one change nothing.

    A loss divides by the rows of its batch or by their weights, but for torch's means over labels (`cross_entropy`, `nll_loss`), which
    divide by the labels that are not ignored, or by their classes' weights: so do the loss modules of these names, and what calls them.
    A function or training step may say itself what it divides by: it returns (sum, count).

    Raises:
        ConfigError: the loss is not a mean, or there is a weight column and the loss cannot be computed per row.
    """

    def __init__(self, program: Program, *, weighted: bool) -> None:
        self._step = program.training_step
        self._loss: Any = program.loss
        self._over_labels = isinstance(self._loss, nn.CrossEntropyLoss | nn.NLLLoss)
        self._compiled = self._step is not None and _is_compiled(program.model)
        self._per_row: Callable[..., Tensor] | None = None
        self._takes_weight = False
        self.mixed = False
        """Whether the last batch's loss had parts that torch divided by different counts, so that rows counted."""
        self._watches = not _is_of_torch(program.loss)
        if self._step is not None:
            return
        if (reduction := getattr(program.loss, "reduction", None)) in {"sum", "none"}:
            raise ConfigError(
                f"{program.loss!r} has reduction={reduction!r}, but the loss must be one number a batch (reduction='mean'): "
                "the learning rate must not depend on how many rows a batch has. Use the mean, or training_step(model, "
                "batch) for another scale."
            )
        if not weighted:
            return
        function = program.loss.func if isinstance(program.loss, functools.partial) else program.loss
        if getattr(function, "__module__", "") == "torch.nn.functional":
            # Their argument `weight` is one per class, or does not divide by the sum of the weights.
            raise ConfigError(
                f"weight_col with {getattr(function, '__name__', function)}: it does not take a weight a row. Use the loss "
                "module of that name (nn.CrossEntropyLoss() for F.cross_entropy), or write loss(output, label, weight)."
            )
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

    def __call__(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """The loss of `batch`: a mean over its rows, weighted where there are weights."""
        if self._step is None:
            return self.of_output(forward(model, batch.features), batch)
        watch: AbstractContextManager[Any] = nullcontext() if self._compiled else DenominatorWatch()
        with watch:
            loss = self._step(model, batch)
        return self._measured(loss, batch, watch if isinstance(watch, DenominatorWatch) else None)

    def take_logged(self, *, training: bool) -> dict[str, list[float]]:
        """What the model logged itself since the last call: name -> [sum over rows, rows]."""
        take = getattr(self._step, "take_logged", None)
        return take(training=training) if take is not None else {}

    def count(self, batch: Batch) -> Count | None:
        """What the loss of `batch` is divided by, where that is known before the loss is."""
        if self._step is not None or (self._watches and batch.weights is None):
            return None
        if not self._over_labels or not isinstance(batch.labels, Tensor):
            return _rows_of(batch)
        if batch.weights is None:
            return count_labels(batch.labels, self._loss.weight, self._loss.ignore_index)
        counts = self._label_counts(batch.labels)
        total = batch.weights.sum() if counts is None else _weighed(counts, batch.weights).sum()
        return float(total) if total.device.type == "cpu" else total

    def of_output(self, output: Any, batch: Batch) -> BatchLoss:
        """The loss for an output that is already there (validation computes it once)."""
        assert self._loss is not None
        if isinstance(self._loss, _Loss):  # one of torch's own, which takes tensors only
            output = logits_of(output)
        labels = _aligned(self._loss, output, batch.labels)
        if batch.weights is not None and self._takes_weight:
            return self._measured(self._loss(output, labels, weight=batch.weights), batch, None)
        if batch.weights is not None and self._per_row is not None:
            return self._weighted(output, labels, batch.weights)
        if not self._watches:
            count = self.count(batch)
            assert count is not None
            return BatchLoss(self._loss(output, labels), count)
        with DenominatorWatch() as watch:
            loss = self._loss(output, labels)
        return self._measured(loss, batch, watch)

    def _measured(self, loss: Any, batch: Batch, watch: DenominatorWatch | None) -> BatchLoss:
        if (own := stated(loss)) is not None:
            return own
        count = watch.count() if watch is not None else None
        self.mixed = watch is not None and count is None and bool(watch.counts)
        return BatchLoss(loss, _rows_of(batch) if count is None else count)

    def _label_counts(self, labels: Any) -> Tensor | None:
        if not self._over_labels or not isinstance(labels, Tensor):
            return None
        return label_counts(labels, self._loss.weight, self._loss.ignore_index)

    def _weighted(self, output: Any, labels: Any, weights: Tensor) -> BatchLoss:
        assert self._per_row is not None
        losses = self._per_row(output, labels)
        if losses.dim() == 0 or len(losses) != len(weights):
            raise ConfigError(
                f"weight_col needs a loss per row, but {self._loss!r} with reduction='none' gives shape "
                f"{tuple(losses.shape)} for {len(weights)} rows. Write loss(output, label, weight), or use "
                "training_step(model, batch) with batch.weights."
            )
        counts = self._label_counts(labels)
        if counts is None:
            flat = losses.flatten(1) if losses.dim() > 1 else losses[:, None]
            losses = flat.sum(1) if getattr(self._loss, "reduction", "") == "batchmean" else flat.mean(1)
            total = weights.sum()
        else:
            total = _weighed(counts, weights).sum()
            weights = weights.reshape(-1, *[1] * (losses.dim() - 1))
        # A batch whose weights are all zero contributes nothing; its mean would be 0/0.
        mean = (losses * weights).sum() / torch.where(total > 0, total, torch.ones_like(total))
        return BatchLoss(mean, float(total) if total.device.type == "cpu" else total.detach())

    def check_weights(self, output: Any, batch: Batch) -> None:
        """Compare the loss under weights of one with the loss without weights, which must be the same number.

        Raises:
            ConfigError: they differ, so a weight column would train on another loss; with both numbers.
        """
        if batch.weights is None or self._step is not None or not self._has_plain():
            return
        stream = torch.get_rng_state()
        ones = dataclasses.replace(batch, weights=torch.ones_like(batch.weights))
        weighted = self.of_output(output, ones).mean
        torch.set_rng_state(stream)
        plain = self.of_output(output, dataclasses.replace(batch, weights=None)).mean
        if plain.numel() != 1 or weighted.numel() != 1 or not bool(torch.isfinite(plain).all()):
            return
        got, expected = float(weighted.detach()), float(plain.detach())
        eps = torch.finfo(plain.dtype).eps if plain.is_floating_point() else 0.0
        if abs(got - expected) > eps**0.5 * abs(expected) + 8 * eps:
            raise ConfigError(
                f"weight_col would change the loss itself: with a weight of 1 for every row it is {got:.6g}, without weights "
                f"{expected:.6g}, on the first rows. {self._loss!r} is no plain mean over rows; write "
                "loss(output, label, weight), or use training_step(model, batch) with batch.weights."
            )

    def _has_plain(self) -> bool:
        if not self._takes_weight:
            return self._per_row is not None
        assert self._loss is not None
        return inspect.signature(self._loss).parameters["weight"].default is not inspect.Parameter.empty


def _rows_of(batch: Batch) -> float:
    return float(batch.rows) if batch.weights is None else float(batch.weights.sum())


def _weighed(counts: Tensor, weights: Tensor) -> Tensor:
    return counts * weights.reshape(-1, *[1] * (counts.dim() - 1))


def _is_of_torch(loss: Any) -> bool:
    """Whether its class is torch's own: then its module says what it divides by."""
    return isinstance(loss, _Loss) and type(loss).__module__.startswith("torch.nn.")


def _is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile traces a part of it, which must not meet a mode of ours on its way."""
    return any(part._compiled_call_impl is not None or hasattr(part, "_orig_mod") for part in model.modules())


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


_ELEMENTWISE: Final = {
    *("add", "radd", "sub", "rsub", "mul", "rmul", "div", "rdiv", "truediv", "rtruediv"),
    *("subtract", "multiply", "divide", "true_divide"),
}


class BroadcastWatch(TorchFunctionMode):
    """Notices when the labels, or something computed from them, broadcast against something else to (rows, rows).

    Only sums, differences, products and quotients of (rows, 1) and (rows,) count, and only where one of the two comes
    from the labels and the other does not: all pairs of labels, or all pairs of outputs, are what a contrastive loss
    means.

    Args:
        rows: of the batch.
        labels: a tensor, or a dict of them.
    """

    def __init__(self, rows: int, labels: Any) -> None:
        super().__init__()
        self._rows = rows
        # By identity, and kept alive, so that no other tensor is given the same identity.
        self._from_labels: dict[int, Tensor] = {id(tensor): tensor for tensor in _tensors(labels)}
        self.found = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, and compare the shape of its result with those of its arguments."""
        del types
        result = func(*args, **(kwargs or {}))
        given = list(_tensors([*args, *(kwargs or {}).values()]))
        known = [id(tensor) in self._from_labels for tensor in given]
        if any(known):
            self._from_labels |= {id(tensor): tensor for tensor in _tensors(result)}
        name = getattr(func, "__name__", "").strip("_")
        if name in _ELEMENTWISE and len(given) == 2 and sum(known) == 1 and self._rows > 1:
            self.found |= {tuple(tensor.shape) for tensor in given} == {(self._rows, 1), (self._rows,)}
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class single_row_norms:  # noqa: N801 (reads as a verb at its one call site)
    """Batch norms use their running statistics while a shard of one row trains: one row has no variance."""

    def __init__(self, model: nn.Module) -> None:
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]

    def __enter__(self) -> None:
        for norm in self._norms:
            norm.eval()

    def __exit__(self, *_: object) -> None:
        for norm in self._norms:
            norm.train()
