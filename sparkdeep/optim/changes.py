"""What a round's replicas changed: kept until all are there, then combined, by slices of the vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparkdeep.errors import ConfigError
from sparkdeep.tensors.encoding import CHUNK, chunks_of
from sparkdeep.tensors.mean import reduced_weights
from sparkdeep.tensors.parameters import Layout

if TYPE_CHECKING:
    from sparkdeep.optim.aggregators import Aggregator

__all__ = ["Changes", "Floats"]

Floats: TypeAlias = NDArray[np.float64]

# Elements of every replica that are looked at together: N x 512 KB in float64.
_SLICE: Final = 1 << 16


@final
class Changes:
    """Keeps the vectors of all replicas that count, for an aggregator to combine when all are there.

    Unlike `OrderedSum`, whose memory is one vector, this keeps N of them on the driver: N x P bytes. All is computed in
    float64, in replica order, and rounded once.

    Args:
        aggregator: how they are combined.
        layout: of the vectors.
        weights: one a replica, >= 0; one of weight 0 does not count.
        start: (numel,), what replicas began the round with.
        differences: whether what is added are differences from `start`, and not parameters.
        out: (numel,), where the result is written, rounded once to its dtype.
        plain: names of the parameters that take the plain mean under `RadialDirectional`.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        layout: Layout,
        weights: Sequence[float],
        *,
        start: Tensor,
        differences: bool,
        out: Tensor,
        plain: frozenset[str] = frozenset(),
    ) -> None:
        assert out.numel() == start.numel() == layout.numel, "aggregators combine parameters, and nothing beside them"
        self.numel = layout.numel
        self.chunk = CHUNK
        self.layout = layout
        self.plain = plain
        self._aggregator = aggregator
        self._start = start.detach().numpy()
        self._differ = differences
        self._out = out
        self._weights = {i: weight for i, weight in enumerate(reduced_weights(weights)) if weight > 0}
        self._vectors: dict[int, Tensor] = {}

    def add(self, replica: int, chunks: Callable[[int, int], Tensor], wait: Callable[[], None]) -> None:
        """Take in one replica's vector; nobody waits for another, so `wait` is not called.

        Args:
            replica: the replica's number; its weight must be positive.
            chunks: called as `chunks(start, stop)` in ascending order; gives elements start..stop of the vector.
            wait: of `OrderedSum`.
        """
        del wait
        assert replica in self._weights, f"replica {replica} does not count"
        vector = torch.empty(self.numel, dtype=self.layout.dtype)
        for start, stop in chunks_of(self.numel):
            vector[start:stop].copy_(chunks(start, stop))
        self._vectors[replica] = vector

    def mean(self) -> Tensor:
        """The combination, shape (numel,), in `out`; to be asked for after every positive-weight replica has added.

        Raises:
            ConfigError: the aggregator left elements out, or gave some twice.
        """
        missing = sorted(self._weights.keys() - self._vectors.keys())
        assert not missing, f"replicas {missing} have not added their vector"
        assert self._weights, "the mean of no replica is undefined"
        given = 0
        for part, values in self._aggregator.combine(self, np.array(list(self._weights.values()))):
            np.copyto(self._out.numpy()[part], values, casting="same_kind")
            given += values.size
        if given != self.numel:
            raise ConfigError(
                f"aggregator={self._aggregator!r}: combine gave {given} of {self.numel} parameters; it must give each once."
            )
        return self._out

    def slices(self, place: slice | None = None) -> Iterator[slice]:
        """The slices of a place in the vector, or of all of it, that are looked at one after the other."""
        start, stop = (0, self.numel) if place is None else (place.start, place.stop)
        return (slice(at, min(at + _SLICE, stop)) for at in range(start, stop, _SLICE))

    def parameters(self, part: slice) -> Floats:
        """(replicas, elements) that the replicas ended with."""
        return self._values(part) + self._start[part] if self._differ else self._values(part)

    def differences(self, part: slice) -> Floats:
        """(replicas, elements), the parameters less those that the round began with."""
        return self._values(part) if self._differ else self._values(part) - self._start[part]

    def _values(self, part: slice) -> Floats:
        return np.stack([self._vectors[i].numpy()[part] for i in self._weights]).astype(np.float64)

    def norms(self, place: slice | None = None) -> Floats:
        """(replicas,), the 2-norms of the differences."""
        squares = (np.square(self.differences(part)).sum(axis=1) for part in self.slices(place))
        return np.sqrt(sum(squares, np.zeros(len(self._weights))))

    def summed(self, part: slice, shares: Floats) -> Floats:
        """(elements,), `sum_i shares_i * difference_i` in replica order."""
        weighed = (share * own for share, own in zip(shares, self.differences(part), strict=True))
        return sum(weighed, np.zeros(part.stop - part.start))

    def moved(self, shares: Floats, place: slice | None = None) -> Iterator[tuple[slice, Floats]]:
        """Slice by slice, what the round began with and `summed`: what `combine` gives where it weighs whole vectors."""
        return ((part, self._start[part] + self.summed(part, shares)) for part in self.slices(place))
