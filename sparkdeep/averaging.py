"""The exact weighted mean of replicas: float64, added chunk by chunk in replica order, divided once."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["OrderedSum", "pool_buffers", "reduced_weights"]


def reduced_weights(weights: Sequence[float]) -> list[float]:
    """The same proportions in the smallest whole numbers where the weights are whole, else unchanged.

    Row counts that share a divisor lose it, so that equal shards weigh 1 each and a lone replica is copied
    exactly, also in float64, where `w * x` would round.
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


class OrderedSum:
    """Accumulates `sum_i w_i * x_i` in float64 while the replicas' vectors arrive in any interleaving.

    Every element is summed in replica order: chunk `c` of replica `i` waits for chunk `c` of replica `i - 1`, so
    not a bit of the result depends on who arrives first. For whole-number weights and float32 vectors each
    product is exact. Memory: 8 bytes an element, whatever the number of replicas.

    Args:
        numel: length of each vector.
        weights: one weight a replica, >= 0; a replica of weight 0 must not add.
        chunk: elements per turn.
    """

    def __init__(self, numel: int, weights: Sequence[float], *, chunk: int = 1 << 18) -> None:
        self.weights = reduced_weights(weights)
        self.numel = numel
        self.chunk = chunk
        self._sum = torch.zeros(numel, dtype=torch.float64)
        self._order = [i for i, w in enumerate(self.weights) if w > 0]
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
        weight = self.weights[replica]
        for start in range(0, self.numel, self.chunk):
            stop = min(start + self.chunk, self.numel)
            values = chunks(start, stop)
            if before is not None:
                with self._turn:
                    while self._done[before] < stop:
                        if not self._turn.wait(timeout=0.25):
                            wait()
            self._sum[start:stop].add_(values, alpha=weight)
            with self._turn:
                self._done[replica] = stop
                self._turn.notify_all()

    def mean(self) -> Tensor:
        """The weighted mean, shape (numel,) float64. Call it once, after every positive-weight replica has added."""
        unfinished = [i for i, done in self._done.items() if done < self.numel]
        assert not unfinished, f"replicas {unfinished} have not added all of their vector"
        assert self._order, "the mean of no replica is undefined"
        total = sum(self.weights)
        return self._sum if total == 1.0 else self._sum.div_(total)


def pool_buffers(
    replicas: Sequence[Mapping[str, Tensor]], weights: Sequence[float], variance_of: Mapping[str, str]
) -> dict[str, Tensor]:
    """Pool the buffers of replicas: the statistics of the concatenated data where they are mean and variance.

    Floating-point buffers take the weighted mean; a running variance named in `variance_of` takes
    `sum_i w_i (var_i + (mean_i - mean)^2)`; integer and boolean buffers take the maximum. Computed in float64 and
    rounded once to the buffer's dtype. Replicas of weight 0 are ignored.
    """
    counted = [(b, w) for b, w in zip(replicas, reduced_weights(weights), strict=True) if w > 0]
    total = sum(w for _, w in counted)
    pooled: dict[str, Tensor] = {}
    for name, first in counted[0][0].items():
        values = [b[name] for b, _ in counted]
        if not (first.is_floating_point() or first.is_complex()):
            pooled[name] = torch.stack(values).amax(0)
            continue
        wide = torch.complex128 if first.is_complex() else torch.float64
        if name in variance_of:
            means = [b[variance_of[name]].to(wide) for b, _ in counted]
            mean = _mean(means, [w for _, w in counted], total)
            values = [v.to(wide) + (m - mean).square() for v, m in zip(values, means, strict=True)]
        pooled[name] = _mean([v.to(wide) for v in values], [w for _, w in counted], total).to(first.dtype)
    return pooled


def _mean(values: Sequence[Tensor], weights: Sequence[float], total: float) -> Tensor:
    result = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        result += weight * value
    return result / total
