"""The order of an epoch: which rows make which batch, as pure functions."""

from __future__ import annotations

import hashlib
import json
from typing import final

import numpy as np
import numpy.typing as npt

from sparkdeep.errors import ConfigError

__all__ = ["EpochOrder", "batch_bounds", "batch_range", "num_batches", "steps_per_epoch"]

Indices = npt.NDArray[np.int64]


def num_batches(rows: int, batch_size: int) -> int:
    """Return how many batches an epoch of `rows` rows has.

    A last batch of exactly one row is joined to the one before it, when batch_size > 1: BatchNorm cannot train on one
    row. A shard of one row still makes its one batch.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: a batch needs at least one row; pass 1 or more")
    full, rest = divmod(rows, batch_size)
    joined = rest == 1 and full > 0
    return full + (1 if rest and not joined else 0)


def batch_range(rows: int, batch_size: int, index: int) -> tuple[int, int]:
    """Return [start, stop) of one batch in the epoch's order, counted from 0.

    Raises:
        IndexError: the epoch has no such batch.
    """
    count = num_batches(rows, batch_size)
    if not 0 <= index < count:
        raise IndexError(f"batch {index} of an epoch of {count} batches ({rows} rows by {batch_size})")
    return index * batch_size, rows if index == count - 1 else (index + 1) * batch_size


def batch_bounds(rows: int, batch_size: int) -> Indices:
    """Return [start, stop) of every batch of an epoch, (num_batches, 2) int64."""
    starts = np.arange(num_batches(rows, batch_size), dtype=np.int64) * batch_size
    return np.stack([starts, np.append(starts, rows)[1:]], axis=1)


@final
class EpochOrder:
    """The order in which one epoch visits a shard's rows: each once, a pure function of the arguments.

    Up to `window_rows` rows it is one permutation. Beyond that, blocks of consecutive rows come in random order and
    rows are shuffled inside windows of several blocks, so that reading stays near-sequential and only one window's
    indices are in memory.
    """

    def __init__(
        self,
        rows: int,
        *,
        seed: int,
        epoch: int,
        digest: str,
        block_rows: int = 4096,
        window_rows: int = 1 << 20,
    ) -> None:
        """Fix the order.

        Args:
            rows: rows of the shard's split.
            seed: the run's seed.
            epoch: number of the epoch.
            digest: of the shard: the order is for these rows only.
            block_rows: consecutive rows that travel together between windows.
            window_rows: rows shuffled at once; 8 bytes of memory each.
        """
        if rows < 0 or block_rows < 1 or window_rows < 1:
            raise ConfigError(
                f"rows={rows}, block_rows={block_rows}, window_rows={window_rows}: rows must be 0 or "
                "more, the others 1 or more"
            )
        self.rows = rows
        self._key = (seed, epoch, digest)
        self.block_rows = rows if rows <= window_rows else min(block_rows, window_rows)
        self.window_blocks = 1 if rows <= window_rows else window_rows // self.block_rows
        self.num_blocks = -(-rows // self.block_rows) if rows else 0
        self.num_windows = -(-self.num_blocks // self.window_blocks)
        self._blocks: Indices = self._generator("blocks", 0).permutation(self.num_blocks)  # (blocks,) int64
        # Only the last block on disk may be short; every window that comes after it starts that much earlier.
        self._missing = self.num_blocks * self.block_rows - rows
        self._short_at = int(np.argmax(self._blocks)) if rows else 0
        self._cached = -1
        self._cached_from = self._cached_to = 0
        self._window: Indices = np.zeros(0, np.int64)

    def indices(self, start: int, stop: int) -> Indices:
        """Return the rows at positions [start, stop) of the epoch, (stop - start,) int64, not to be written to.

        Raises:
            IndexError: the range reaches outside the epoch.
        """
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"positions {start} to {stop} reach outside an epoch of {self.rows} rows")
        if (
            self._cached_from <= start and stop <= self._cached_to
        ):  # nearly always true: the range lies within the window of the last call
            return self._window[start - self._cached_from : stop - self._cached_from]
        pieces: list[Indices] = []
        # Windows are never longer than this, so this one starts no later than `start`.
        window = start // max(1, self.window_blocks * self.block_rows)
        while start < stop:
            first, end = self._start(window), self._start(window + 1)
            if start < end:
                upto = min(stop, end)
                pieces.append(self._rows_of(window)[start - first : upto - first])
                start = upto
            window += 1
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    def block(self, number: int) -> tuple[int, int]:
        """Return [start, stop) on disk of the block that is the `number`-th in this epoch."""
        start = int(self._blocks[number]) * self.block_rows
        return start, min(start + self.block_rows, self.rows)

    def _start(self, window: int) -> int:
        block = min(window * self.window_blocks, len(self._blocks))
        return block * self.block_rows - (self._missing if block > self._short_at else 0)

    def _rows_of(self, window: int) -> Indices:
        if window != self._cached:
            blocks = self._blocks[window * self.window_blocks : (window + 1) * self.window_blocks]
            rows = (blocks[:, None] * self.block_rows + np.arange(self.block_rows)).reshape(-1)
            self._window = self._generator("window", window).permutation(rows[rows < self.rows])
            self._cached = window
            self._cached_from, self._cached_to = self._start(window), self._start(window + 1)
        return self._window

    def _generator(self, kind: str, number: int) -> np.random.Generator:
        seed = hashlib.blake2b(json.dumps([*self._key, kind, number]).encode(), digest_size=32).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(seed, "little")))


def steps_per_epoch(rows: int, *, batch_size: int, accumulate_batches: int) -> int:
    """How many local steps an epoch over `rows` training rows has."""
    return -(-num_batches(rows, batch_size) // accumulate_batches)
