"""The rows of an epoch's batches, in the order in which a replica visits them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from sparkdeep.data.order import EpochOrder, num_batches
from sparkdeep.data.shards import FieldValues, Shard
from sparkdeep.storage.disks import own_files

__all__ = ["Feed"]


@final
class Feed:
    """The training rows of one shard, batch by batch.

    A shard of several windows is read from disk ahead: while one window's rows are gathered in random order, the
    system reads the blocks of the next in long stretches. Two windows should fit in memory for that.

    Args:
        shard: open for as long as batches are read.
        batch_size: rows a batch.
        accumulate_batches: batches a local step.
        seed, block_rows, window_rows: see `EpochOrder`.
    """

    def __init__(
        self,
        shard: Shard,
        *,
        batch_size: int,
        accumulate_batches: int,
        seed: int,
        block_rows: int,
        window_rows: int,
    ) -> None:
        self._shard = shard
        self._batch_size = batch_size
        self._per_step = accumulate_batches
        self._order_settings = {"seed": seed, "block_rows": block_rows, "window_rows": window_rows}
        self._order: tuple[int, EpochOrder] | None = None
        self._asked = (-1, 0)
        """Epoch, and how many of its blocks the system has been asked to read."""

    def batches(self, epoch: int, first: int, last: int) -> Iterator[tuple[int, dict[str, FieldValues]]]:
        """Gather the batches of local steps [first, last), each with its number in the epoch.

        An epoch's last step may have fewer batches than others.

        Raises:
            ReplicaLostError: the disk failed.
        """
        rows, size = self._shard.info.rows["train"], self._batch_size
        per_step = self._per_step
        order = self._order_of(epoch)
        with own_files("it read the shard"):
            count = num_batches(rows, size)
            for index in range(first * per_step, min(last * per_step, count)):
                start = index * size
                stop = rows if index == count - 1 else start + size  # (`order.batch_range`, without its checks)
                if order.num_windows > 1:
                    self._read_ahead(epoch, order, start)
                yield index, self._shard.gather("train", order.indices(start, stop))

    def _order_of(self, epoch: int) -> EpochOrder:
        if self._order is None or self._order[0] != epoch:
            rows, digest = self._shard.info.rows["train"], self._shard.info.digest
            self._order = (epoch, EpochOrder(rows, epoch=epoch, digest=digest, **self._order_settings))
        return self._order[1]

    def _read_ahead(self, epoch: int, order: EpochOrder, position: int) -> None:
        """Ask the system to read up to one window beyond `position`, from where it was last asked to."""
        within = position // order.block_rows
        asked = self._asked[1] if self._asked[0] == epoch else within - within % order.window_blocks
        upto = min(within + 1 + order.window_blocks, order.num_blocks)
        for block in range(asked, upto):
            self._shard.will_need("train", *order.block(block))
        self._asked = (epoch, max(asked, upto))
