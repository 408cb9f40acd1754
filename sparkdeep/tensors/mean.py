"""The exact weighted mean of replicas: float64, added chunk by chunk in replica order, divided once, rounded once."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np
import torch
from torch import Tensor

__all__ = ["Combining", "OrderedSum", "Partition", "reduced_weights", "weighted_mean"]


def reduced_weights(weights: Sequence[float]) -> list[float]:
    """The weights in lowest terms if they are whole numbers, else unchanged.

    Row counts are divided by their greatest common divisor, so that equal shards weigh 1 each and a lone replica is
    copied exactly, also in float64, where `w * x` would round.
    """
    if any(w < 0 or not math.isfinite(w) for w in weights):
        raise ValueError(f"weights must be finite and not negative, got {list(weights)}")
    positive = [w for w in weights if w > 0]
    if len(positive) == 1:
        return [1.0 if w > 0 else 0.0 for w in weights]
    if not positive or not all(float(w).is_integer() for w in positive):
        return [float(w) for w in weights]
    divisor = math.gcd(*(int(w) for w in positive))
    return [w / divisor for w in weights]


class Combining(Protocol):
    """Takes in replicas' vectors as they arrive, each in a thread of its own, and combines them into one vector."""

    numel: int
    chunk: int

    def add(self, replica: int, chunks: Callable[[int, int], Tensor], wait: Callable[[], None]) -> None:
        """Take in one replica's vector, chunk by chunk."""

    def mean(self) -> Tensor:
        """The combined vector, (numel,), once every replica of positive weight has added its own."""


class OrderedSum:
    """Accumulates `sum_i w_i * x_i` in float64 while the replicas' vectors arrive in any interleaving.

    Every element is summed in replica order: chunk `c` of replica `i` waits for chunk `c` of replica `i - 1`, so
    not a bit of the result depends on who arrives first. For whole-number weights and float32 vectors each
    product is exact. The last replica in order divides a chunk and rounds it into `out` while it is still in the
    processor's cache.

    Args:
        numel: length of each vector.
        weights: one weight a replica, >= 0; a replica of weight 0 must not add.
        divisor: what the sum is divided by; None: by the sum of the weights, which is the mean.
        out: where the mean is written, (numel,), rounded once to its dtype; None: a new float64 vector.
        base: (numel,), added to the mean: what the vectors are differences from.
        base_share: the factor by which `base` is multiplied first.
        chunk: elements per turn.
        sums: float64, where chunks are summed, as many at the same time as have room in it: a replica that is further
            ahead waits. None for all of them, where one thread adds one replica after the other.
    """

    def __init__(
        self,
        numel: int,
        weights: Sequence[float],
        *,
        divisor: float | None = None,
        out: Tensor | None = None,
        base: Tensor | None = None,
        base_share: float = 1.0,
        chunk: int = 1 << 18,
        sums: Tensor | None = None,
    ) -> None:
        self.weights = reduced_weights(weights) if divisor is None else list(weights)
        self.numel = numel
        self.chunk = chunk
        self._out = torch.empty(numel, dtype=torch.float64) if out is None else out
        assert self._out.numel() == numel, f"the mean of {numel} elements does not fit in {self._out.numel()}"
        self._base = base
        if sums is None:  # where the mean goes, if that is wide enough
            sums = self._out if self._out.dtype == torch.float64 else torch.empty(numel, dtype=torch.float64)
        self._sums = sums
        self._window = -(-sums.numel() // chunk)
        self._order = [i for i, w in enumerate(self.weights) if w > 0]
        self._total = sum(self.weights) if divisor is None else divisor
        self._base_share = base_share
        self._done = dict.fromkeys(self._order, 0)
        self._turn = threading.Condition()

    def add(self, replica: int, chunks: Callable[[int, int], Tensor], wait: Callable[[], None]) -> None:
        """Add one replica's vector, taking turns with the others.

        Args:
            replica: the replica's number; its weight must be positive.
            chunks: called as `chunks(start, stop)` in ascending order; gives elements start..stop of the vector.
            wait: called whenever a wait for the turn has lasted 0.25 s; raises to give up.
        """
        place = self._order.index(replica)
        before = self._order[place - 1] if place else None
        last = self._order[-1]
        weight = self.weights[replica]
        for index, start in enumerate(range(0, self.numel, self.chunk)):
            stop = min(start + self.chunk, self.numel)
            values = chunks(start, stop)
            # The first replica starts a chunk when its place in the window is free, the others after the one before.
            leader, ahead = (last, index - self._window + 1) if before is None else (before, index + 1)
            with self._turn:
                while self._done[leader] < ahead:
                    if not self._turn.wait(timeout=0.25):
                        wait()
            at = index % self._window * self.chunk
            total = self._sums[at : at + stop - start]
            _accumulate(total, values, weight, first=before is None)
            if replica == last:
                self._finish(total, start, stop)
            with self._turn:
                self._done[replica] = index + 1
                self._turn.notify_all()

    def _finish(self, total: Tensor, start: int, stop: int) -> None:
        base = None if self._base is None else self._base[start:stop]
        if base is not None and self._base_share != 1.0:
            base = base.to(torch.float64) * self._base_share
        _finish(total, self._total, base, None if self._sums is self._out else self._out[start:stop])

    def mean(self) -> Tensor:
        """The weighted mean, shape (numel,), in `out`; to be asked for after every positive-weight replica has added."""
        count = -(-self.numel // self.chunk)
        unfinished = [i for i, done in self._done.items() if done < count]
        assert not unfinished, f"replicas {unfinished} have not added all of their vector"
        assert self._order, "the mean of no replica is undefined"
        return self._out


def weighted_mean(vectors: Sequence[Tensor], weights: Sequence[float], out: Tensor, *, chunk: int = 1 << 18) -> Tensor:
    """`OrderedSum` of vectors that are all at hand: the same sums in the same order, written into `out`, (numel,).

    Args:
        vectors: one per replica, (numel,); one of weight 0 is not read.
        weights: one per replica, >= 0, not all 0.
        out: where the mean is written, rounded once to its dtype.
        chunk: elements that are summed at a time.
    """
    shares = reduced_weights(weights)
    counted = [(vector, weight) for vector, weight in zip(vectors, shares, strict=True) if weight > 0]
    whole = sum(shares)
    room = torch.empty(min(chunk, out.numel()), dtype=torch.float64)
    for start in range(0, out.numel(), chunk):
        stop = min(start + chunk, out.numel())
        total = room[: stop - start]
        for place, (vector, weight) in enumerate(counted):
            _accumulate(total, vector[start:stop], weight, first=place == 0)
        _finish(total, whole, None, out[start:stop])
    return out


# numpy, and not torch, adds here: torch would divide each chunk among threads of its own, which then wait for each other
# beside the threads that receive; one core a replica is what there is.


def _accumulate(total: Tensor, values: Tensor, weight: float, *, first: bool) -> None:
    """`total = weight * values` for the first replica, `total += weight * values` for the others, in float64."""
    sums, own = total.numpy(), values.numpy()
    if first:
        np.copyto(sums, own)
        if weight != 1.0:
            np.multiply(sums, weight, out=sums)
    elif weight == 1.0:
        np.add(sums, own, out=sums)
    else:
        np.add(sums, np.multiply(own, weight, dtype=np.float64), out=sums)


def _finish(total: Tensor, whole: float, base: Tensor | None, out: Tensor | None) -> None:
    """Divide a finished chunk by the summed weights, add the base, and round it into `out`."""
    sums = total.numpy()
    if math.frexp(whole)[0] == 0.5:  # a power of two: multiplying gives the same bits, and is faster
        if whole != 1.0:
            np.multiply(sums, 1.0 / whole, out=sums)
    else:
        np.divide(sums, whole, out=sums)
    if base is not None:
        np.add(sums, base.numpy(), out=sums)
    if out is not None:
        np.copyto(out.numpy(), sums, casting="same_kind")


@final
@dataclass(frozen=True)
class Partition:
    """A vector of `numel` elements in `count` parts."""

    numel: int
    count: int

    @property
    def size(self) -> int:
        """Elements of a full part."""
        return -(-self.numel // self.count)

    def bounds(self, part: int) -> tuple[int, int]:
        """[start, stop) of one part; empty when the elements do not suffice."""
        return min(part * self.size, self.numel), min((part + 1) * self.size, self.numel)
