"""How a round's updates become one: each aggregator computes it from what the replicas changed, kept until all are there."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparkdeep.checks import not_negative
from sparkdeep.errors import ConfigError
from sparkdeep.tensors.encoding import CHUNK, chunks_of
from sparkdeep.tensors.mean import Combining, OrderedSum, reduced_weights
from sparkdeep.tensors.parameters import Layout
from sparkdeep.tensors.pooling import Elementwise

if TYPE_CHECKING:
    from sparkdeep.optim.averaging import Averaging, Shares
    from sparkdeep.protocol.orders import Globals

__all__ = [
    "Aggregator",
    "Changes",
    "Floats",
    "Median",
    "NormClip",
    "RadialDirectional",
    "TrimmedMean",
    "aggregator_of",
    "embeddings_of",
]

# Chunks that are summed at the same time: enough for replicas that arrive in bursts, few enough for the caches.
_WINDOW: Final = 4
# Elements of every replica that are looked at together: N x 512 KB in float64.
_SLICE: Final = 1 << 16

Floats: TypeAlias = NDArray[np.float64]


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


class Aggregator(ABC):
    """How updates become one. What derives from it is a frozen dataclass: its fields are part of a run's identity."""

    @abstractmethod
    def combine(self, changes: Changes, weights: Floats) -> Iterator[tuple[slice, Floats]]:
        """Give the new parameters slice by slice, in float64, each of them once.

        Args:
            changes: of the replicas that count, at least one.
            weights: (replicas,), positive.
        """

    def taking(self, averaging: Averaging, shares: Shares, start: Globals, out: Tensor) -> Combining:
        """What takes in the vectors of a round; here all are kept, and combined once they are there.

        Args:
            averaging: of the run.
            shares: of the updates.
            start: what the round began with.
            out: where the result is written.
        """
        return Changes(
            self,
            averaging.layout,
            shares.weights,
            start=start.parameters if start.base is None else start.base,
            differences=start.base is not None,
            out=out,
            plain=averaging.embeddings,
        )

    @property
    def elementwise(self) -> Elementwise | None:
        """What takes the place of the mean where replicas' buffers become one; None: the mean by weight."""
        return None

    def weakness(self, counted: int) -> str:
        """What to say where it does less than it says among so many replicas; else ""."""
        del counted
        return ""


@dataclass(frozen=True)
class _Mean(Aggregator):
    """The mean by weight, of which one vector is kept; the setting is "mean"."""

    def combine(self, changes: Changes, weights: Floats) -> Iterator[tuple[slice, Floats]]:
        return changes.moved(weights / sum(weights))

    def taking(self, averaging: Averaging, shares: Shares, start: Globals, out: Tensor) -> Combining:
        base, rest = start.base, 1.0
        if base is None and shares.rest:
            base, rest = start.parameters.detach(), shares.rest
        return OrderedSum(
            out.numel(),
            shares.weights,
            divisor=shares.divisor,
            out=out,
            base=base,
            base_share=rest,
            chunk=CHUNK,
            sums=averaging.kept("sums", min(_WINDOW * CHUNK, out.numel()), torch.float64),
        )


@dataclass(frozen=True)
class NormClip(Aggregator):
    """The weighted mean of what replicas changed, each change cut to at most the median of their 2-norms."""

    def combine(self, changes: Changes, weights: Floats) -> Iterator[tuple[slice, Floats]]:
        """Weigh each change by its share, times the bound over its norm where that is less than 1."""
        norms = changes.norms()
        kept = np.minimum(norms, np.median(norms))
        cut = np.divide(kept, norms, out=np.ones_like(norms), where=norms > 0)
        return changes.moved(weights / sum(weights) * cut)


@dataclass(frozen=True)
class Median(Aggregator):
    """The median of every coordinate (Yin et al., 2018); replicas count alike."""

    def combine(self, changes: Changes, weights: Floats) -> Iterator[tuple[slice, Floats]]:
        """Numpy's: the mean of the middle two of an even number."""
        del weights
        return ((part, np.median(changes.parameters(part), axis=0)) for part in changes.slices())

    @property
    def elementwise(self) -> Elementwise:
        """The median too."""
        return lambda values, _: torch.from_numpy(np.asarray(np.median(values.numpy(), axis=0)))


@dataclass(frozen=True)
class TrimmedMean(Aggregator):
    """The mean of every coordinate without the largest and the smallest `share` of its values (Yin et al., 2018)."""

    share: float = 0.2
    """Cut from each end, rounded down to whole replicas; below a half."""

    def __post_init__(self) -> None:
        not_negative("TrimmedMean.share", self.share, below=0.5)

    def combine(self, changes: Changes, weights: Floats) -> Iterator[tuple[slice, Floats]]:
        """Sort, cut, and take the mean; replicas count alike."""
        del weights
        for part in changes.slices():
            yield part, self._trimmed(changes.parameters(part))

    @property
    def elementwise(self) -> Elementwise:
        """The trimmed mean too."""
        return lambda values, _: torch.from_numpy(np.asarray(self._trimmed(values.numpy())))

    def _trimmed(self, values: Floats) -> Floats:
        cut = math.floor(self.share * len(values))
        return np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)

    def weakness(self, counted: int) -> str:
        """Of few replicas none is cut."""
        if not 0 < self.share * counted < 1:
            return ""
        enough = math.ceil(1000 / counted) / 1000
        give, more = (
            f"Give a share of at least {enough:g}, or Median().",
            "Use more replicas: of so few none can be cut.",
        )
        return (
            f"rounded down to whole replicas it cuts none of {counted}, and is a plain mean then. "
            f"{give if enough < 0.5 else more}"
        )


@dataclass(frozen=True)
class RadialDirectional(Aggregator):
    """By parameter tensor, the mean length of the changes times their mean direction, made a direction again.

    With many replicas, whose changes point apart, a mean shrinks as 1/sqrt(N); this keeps its length (Decoupled DiLoCo, 2026).
    Tensors of `Embedding` modules take the plain mean.
    """

    def combine(self, changes: Changes, weights: Floats) -> Iterator[tuple[slice, Floats]]:
        """Tensor by tensor."""
        for entry in changes.layout.entries:
            place = slice(entry.offset, entry.offset + entry.numel)
            plain = entry.name in changes.plain
            shares = weights / sum(weights) if plain else self._shares(changes, weights, place)
            yield from changes.moved(shares, place)

    @staticmethod
    def _shares(changes: Changes, weights: Floats, place: slice) -> Floats:
        """`(sum_i w_i |d_i| / W) * u / |u|` with `u = sum_i w_i d_i / |d_i|`; where directions cancel out, nothing moves."""
        norms = changes.norms(place)
        length = sum(weights * norms) / sum(weights)
        towards = np.divide(weights, norms, out=np.zeros_like(norms), where=norms > 0)
        squares = sum(float(np.square(changes.summed(part, towards)).sum()) for part in changes.slices(place))
        # A sum of unit vectors that is rounding alone has no direction.
        known = math.sqrt(squares) > 1e-12 * sum(weights)
        return (length / math.sqrt(squares) if known else 0.0) * towards


def aggregator_of(setting: Aggregator | Literal["mean"]) -> Aggregator:
    """What a setting means."""
    return setting if isinstance(setting, Aggregator) else _Mean()


def embeddings_of(module: nn.Module) -> frozenset[str]:
    """Names, as in `named_parameters()`, of the parameters that belong to embeddings, also where another module shares them."""
    tables = {
        id(parameter)
        for child in module.modules()
        if isinstance(child, nn.Embedding | nn.EmbeddingBag)
        for parameter in child.parameters(recurse=False)
    }
    return frozenset(name for name, parameter in module.named_parameters() if id(parameter) in tables)
