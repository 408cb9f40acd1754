"""Gradients of several batches: of a local step's, and of a gradient round's, in which the parameters stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from sparkdeep.data.batches import Batch
from sparkdeep.models.denominators import BatchLoss, Count, number_of
from sparkdeep.models.modes import Modes
from sparkdeep.optim.schedule import stretches
from sparkdeep.protocol.messages import RoundSpec
from sparkdeep.replica.reading import Progress, Reader
from sparkdeep.tensors.parameters import Layout

__all__ = ["GradientWork", "accumulate"]


def accumulate(
    batches: Sequence[Batch],
    count_of: Callable[[Batch], Count | None],
    loss_of: Callable[[Batch], BatchLoss],
    parameters: Sequence[Tensor],
    progress: Progress,
) -> None:
    """Add the gradient of the mean over several batches, which is divided once, to the parameters' own.

    Args:
        batches: of the step.
        count_of: what a batch's loss is divided by, where that is known beforehand.
        loss_of: a batch's loss.
        parameters: the trainable ones.
        progress: counts rows and losses.
    """
    known = [count_of(batch) for batch in batches]
    total = sum(number_of(count) for count in known if count is not None)
    late = 0.0
    for batch, count in zip(batches, known, strict=True):
        loss = loss_of(batch)
        if count is None:
            late += number_of(loss.count)
            (loss.mean * loss.count).backward()
        else:
            (loss.mean * (number_of(count) / total if total else 0.0)).backward()
        progress.add(batch.rows, loss)
    if late:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(late)


@final
class GradientWork:
    """Sums up gradients of batches, each times what its loss was divided by, in float64.

    Of "batches" the model is in train mode, as in a local step. Of "all" rows it is in eval mode, and nothing is augmented: a line
    search compares losses, which must depend on the parameters alone. So dropout is off, and batch norms use the running
    statistics that they have, and leave them as they are.

    Args:
        modes: of the program, whose parameters are not changed.
        reader: of the shard.
        parameters: the trainable ones, in the layout's order.
        layout: of the model.
        loss_of: a batch's loss.
    """

    def __init__(
        self,
        modes: Modes,
        reader: Reader,
        parameters: list[Tensor],
        layout: Layout,
        loss_of: Callable[[Batch], BatchLoss],
    ) -> None:
        self._modes = modes
        self._reader = reader
        self._parameters = parameters
        self._layout = layout
        self._loss_of = loss_of

    def mean(self, spec: RoundSpec, own: int, progress: Progress, between: Callable[[float], None]) -> Tensor:
        """The gradient of the mean loss over the round's rows, (numel,) in the layout's dtype; zero without rows.

        Args:
            spec: of the round.
            own: this replica's steps an epoch.
            progress: counts rows, weights, losses and steps.
            between: called before each step or batch with the share of the round that is done; raises to give up.
        """
        total = torch.zeros(self._layout.numel, dtype=torch.float64, device=self._parameters[0].device)
        views = self._layout.views(total)
        (self._modes.train if spec.gradient == "batches" else self._modes.eval)()
        counted = 0.0
        for step in self._steps(spec, own):
            between(progress.steps / max(1, spec.num_steps))
            for batch in step:
                for parameter in self._parameters:
                    parameter.grad = None
                loss = self._loss_of(batch)
                loss.mean.backward()
                count = number_of(loss.count)
                counted += count
                for view, parameter in zip(views, self._parameters, strict=True):
                    if parameter.grad is not None and count > 0:
                        view.add_(parameter.grad, alpha=count)
                progress.add(batch.rows, loss)
            progress.end_step()
        if counted > 0:
            total.div_(counted)
        return total.to("cpu", self._layout.dtype)

    def _steps(self, spec: RoundSpec, own: int) -> Iterator[list[Batch]]:
        if spec.gradient == "all":
            for batch in self._reader.whole():
                yield [batch]
            return
        for epoch, first, last in stretches(spec, own):
            with self._reader.training(epoch, first, last) as steps:
                yield from steps
