"""A replica's batches, from its shard to its device, and how far it is in them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import final

import numpy as np
import torch
from torch import Tensor

from sparkdeep.data.batches import Batch, make_batch
from sparkdeep.data.feed import Feed
from sparkdeep.data.prefetch import prefetch_count, prefetched
from sparkdeep.data.schema import Schema
from sparkdeep.data.shards import FieldValues, Shard
from sparkdeep.models.denominators import BatchLoss
from sparkdeep.models.program import Program, prepared
from sparkdeep.settings.run import LocalSettings
from sparkdeep.storage.disks import own_files

__all__ = ["Progress", "Reader"]

BEAT_S = 0.5


@final
class Reader:
    """Reads batches in a replica's order.

    What is gathered ahead is gathered by a thread that runs nothing of the user's: `collate`, `preprocess` and
    `augment` may draw random numbers, and draw them here in the order of steps, so that not a bit depends on
    `prefetch`.

    Args:
        program: the user's callables.
        settings: of the local work.
        schema: of the shard.
        shard: open for as long as batches are read.
        device: where batches go.
        float_dtype: of floating-point features and labels.
    """

    def __init__(
        self,
        program: Program,
        settings: LocalSettings,
        schema: Schema,
        shard: Shard,
        *,
        device: torch.device,
        float_dtype: torch.dtype,
    ) -> None:
        self._program = program
        self._settings = settings
        self._schema = schema
        self._shard = shard
        self._device = device
        self._float_dtype = float_dtype
        self._feed = Feed(
            shard,
            batch_size=settings.batch_size,
            accumulate_batches=settings.accumulate_batches,
            seed=settings.seed,
            block_rows=settings.block_rows,
            window_rows=settings.window_rows,
        )
        self._prefetch = prefetch_count(settings.prefetch, device)
        self._pin = self._prefetch > 0 and device.type == "cuda"

    @contextmanager
    def training(self, epoch: int, first: int, last: int) -> Iterator[Iterator[list[Batch]]]:
        """The batches of local steps [first, last), a list a step; the block's end leaves no thread.

        Raises:
            ReplicaLostError: the shard cannot be read.
            UserCodeError: `collate` raised.
        """
        rows = self._feed.batches(epoch, first, last)
        if self._program.collate is None:
            with prefetched((self._made(fields, (epoch, i)) for i, fields in rows), self._prefetch) as batches:
                yield self._steps(batches)
        else:
            with prefetched(rows, self._prefetch) as taken:
                yield self._steps(self._made(fields, (epoch, i)) for i, fields in taken)

    def validation(self) -> Iterator[Batch]:
        """The validation rows as they lie in the shard."""
        return self._in_order("validation")

    def whole(self) -> Iterator[Batch]:
        """The training rows as they lie in the shard, not augmented."""
        return self._in_order("train")

    def _in_order(self, split: str) -> Iterator[Batch]:
        rows, size = self._shard.info.rows[split], self._settings.batch_size
        for start in range(0, rows, size):
            with own_files("it read the shard"):
                fields = self._shard.take(split, np.arange(start, min(start + size, rows)))
            yield self._ready(self._made(fields, (0, 0)), augment=False)

    def _steps(self, batches: Iterator[Batch]) -> Iterator[list[Batch]]:
        while step := list(islice(batches, self._settings.accumulate_batches)):
            yield [self._ready(batch, augment=True) for batch in step]

    def _made(self, fields: dict[str, FieldValues], place: tuple[int, int]) -> Batch:
        collate = self._program.collate
        batch = make_batch(fields, self._schema, float_dtype=self._float_dtype, collate=collate, place=place)
        return batch.pinned() if self._pin else batch

    def _ready(self, batch: Batch, *, augment: bool) -> Batch:
        if self._device.type != "cpu":
            batch = batch.to(self._device, non_blocking=True)
        return prepared(batch, self._program, augment=augment)


@final
class Progress:
    """Counts of a round as it goes on.

    Args:
        beat: called with (rows, steps), at most every half second.
    """

    def __init__(self, beat: Callable[[int, int], None]) -> None:
        self.rows = 0
        self.steps = 0
        self.input_s = 0.0
        self._losses: list[Tensor | float] = []
        self._counts: list[Tensor | float] = []
        self._beat = beat
        self._last = time.monotonic()

    def add(self, rows: int, loss: BatchLoss | None = None) -> None:
        """Count a batch."""
        self.rows += rows
        if loss is not None:
            # A number on the CPU is there; one on a device would be waited for, and is fetched when the round ends.
            mean = loss.mean
            self._losses.append(mean.item() if mean.device.type == "cpu" else mean.detach().reshape(()))
            self._counts.append(loss.count)
        if time.monotonic() - self._last > BEAT_S:
            self._beat(self.rows, self.steps)
            self._last = time.monotonic()

    def end_step(self) -> None:
        """Count a local step."""
        self.steps += 1

    def sums(self) -> tuple[float, float]:
        """Sum over batches of what the loss was divided by, and of loss times that; of batches that count."""
        losses, counts = _float64(self._losses), _float64(self._counts)
        return float(counts.sum()), float(losses[counts > 0] @ counts[counts > 0])


def _float64(values: Sequence[Tensor | float]) -> Tensor:
    """(values,), on the CPU: those on a device are fetched together, and may stand among numbers."""
    fetched = [value for value in values if isinstance(value, Tensor)]
    numbers = iter(torch.stack([one.reshape(()).to(torch.float64) for one in fetched]).tolist() if fetched else ())
    return torch.tensor([next(numbers) if isinstance(v, Tensor) else v for v in values], dtype=torch.float64)
