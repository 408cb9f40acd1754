"""The rows of an epoch's batches, in the order in which a replica visits them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from sparkdeep.config import LocalSettings
from sparkdeep.data.order import EpochOrder, batch_range, num_batches
from sparkdeep.data.shards import FieldValues, Shard
from sparkdeep.state_files import own_files

__all__ = ["Feed"]


@final
class Feed:
    """The training rows of one shard, batch by batch.

    A shard of several windows is read from disk ahead: while one window's rows are gathered in random order, the
    system reads the blocks of the next in long stretches. Two windows should fit in memory for that.

    Args:
        shard: open for as long as batches are read.
        settings: batch size, seed, blocks and windows.
    """

    def __init__(self, shard: Shard, settings: LocalSettings) -> None:
        self._shard = shard
        self._settings = settings
        self._order: tuple[int, EpochOrder] | None = None
        self._asked = (-1, 0)
        """Epoch, and how many of its blocks the system has been asked to read."""

    def batches(self, epoch: int, first: int, last: int) -> Iterator[tuple[int, dict[str, FieldValues]]]:
        """Gather the batches of local steps [first, last), each with its number in the epoch.

        An epoch's last step may have fewer batches than others.

        Raises:
            ReplicaLostError: the disk failed.
        """
        rows, size = self._shard.info.rows["train"], self._settings.batch_size
        per_step = self._settings.accumulate_batches
        order = self._order_of(epoch)
        with own_files("it read the shard"):
            for index in range(first * per_step, min(last * per_step, num_batches(rows, size))):
                start, stop = batch_range(rows, size, index)
                if order.num_windows > 1:
                    self._read_ahead(epoch, order, start)
                yield index, self._shard.take("train", order.indices(start, stop))

    def _order_of(self, epoch: int) -> EpochOrder:
        if self._order is None or self._order[0] != epoch:
            order = EpochOrder(
                self._shard.info.rows["train"],
                seed=self._settings.seed,
                epoch=epoch,
                digest=self._shard.info.digest,
                block_rows=self._settings.block_rows,
                window_rows=self._settings.window_rows,
            )
            self._order = (epoch, order)
        return self._order[1]

    def _read_ahead(self, epoch: int, order: EpochOrder, position: int) -> None:
        """Have what lies one window beyond `position` read, and whatever comes before that and was not asked for."""
        within = position // order.block_rows
        asked = self._asked[1] if self._asked[0] == epoch else within - within % order.window_blocks
        upto = min(within + 1 + order.window_blocks, order.num_blocks)
        for block in range(asked, upto):
            self._shard.will_need("train", *order.block(block))
        self._asked = (epoch, max(asked, upto))
