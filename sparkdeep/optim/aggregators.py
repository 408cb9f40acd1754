"""How a round's updates become one: values to choose from; `robust_mean` computes all but the mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparkdeep.checks import not_negative
from sparkdeep.protocol.messages import Update
from sparkdeep.tensors.encoding import CHUNK
from sparkdeep.tensors.mean import reduced_weights
from sparkdeep.tensors.parameters import Layout

__all__ = [
    "Aggregator",
    "Median",
    "NormClip",
    "RadialDirectional",
    "RobustMean",
    "Shares",
    "TrimmedMean",
    "embeddings_of",
    "shares_of",
]


@dataclass(frozen=True)
class NormClip:
    """The weighted mean of what replicas changed, each change cut to at most the median of their 2-norms."""


@dataclass(frozen=True)
class Median:
    """The median of every coordinate (Yin et al., 2018); replicas count alike."""


@dataclass(frozen=True)
class TrimmedMean:
    """The mean of every coordinate without the largest and the smallest `share` of its values (Yin et al., 2018)."""

    share: float = 0.2
    """Cut from each end, rounded down to whole replicas; below a half."""

    def __post_init__(self) -> None:
        not_negative("TrimmedMean.share", self.share, below=0.5)


@dataclass(frozen=True)
class RadialDirectional:
    """By parameter tensor, the mean length of the changes times their mean direction, made a direction again.

    With many replicas, whose changes point apart, a mean shrinks as 1/sqrt(N); this keeps its length (Decoupled DiLoCo, 2026).
    Tensors of `Embedding` modules take the plain mean.
    """


Aggregator: TypeAlias = Literal["mean"] | NormClip | Median | TrimmedMean | RadialDirectional


_F64 = NDArray[np.float64]

# Elements of every replica that are looked at together: N x 512 KB in float64.
_SLICE: Final = 1 << 16


@final
class RobustMean:
    """Keeps the vectors of all replicas that count, and combines them when all are there.

    Unlike `OrderedSum`, whose memory is one vector, this keeps N of them on the driver: N x P bytes. All is computed in
    float64, in replica order, and rounded once.

    Args:
        aggregator: how.
        layout: of the vector.
        weights: one a replica, >= 0; one of weight 0 does not count. `Median` and `TrimmedMean` count the others alike.
        start: (numel,), what replicas began the round with.
        differences: whether what is added are differences from `start`, and not parameters.
        out: (numel,), where the result is written, rounded once to its dtype.
        plain: names of the parameters that take the plain mean under `RadialDirectional`.
    """

    def __init__(
        self,
        aggregator: NormClip | Median | TrimmedMean | RadialDirectional,
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
        self._aggregator = aggregator
        self._layout = layout
        self._start = start.detach().numpy()
        self._differences = differences
        self._out = out
        self._plain = plain
        shares = reduced_weights(weights)
        self._weights = {i: weight for i, weight in enumerate(shares) if weight > 0}
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
        vector = torch.empty(self.numel, dtype=self._layout.dtype)
        for start in range(0, self.numel, self.chunk):
            stop = min(start + self.chunk, self.numel)
            vector[start:stop].copy_(chunks(start, stop))
        self._vectors[replica] = vector

    def mean(self) -> Tensor:
        """The combination, shape (numel,), in `out`; to be asked for after every positive-weight replica has added."""
        missing = sorted(self._weights.keys() - self._vectors.keys())
        assert not missing, f"replicas {missing} have not added their vector"
        assert self._weights, "the mean of no replica is undefined"
        rule = self._aggregator
        if isinstance(rule, NormClip):
            self._clip()
        elif isinstance(rule, RadialDirectional):
            for entry in self._layout.entries:
                place = slice(entry.offset, entry.offset + entry.numel)
                self._mean_of(place) if entry.name in self._plain else self._radial(place)
        else:
            cut = math.floor(rule.share * len(self._weights)) if isinstance(rule, TrimmedMean) else None
            self._by_coordinate(cut)
        return self._out

    def _by_coordinate(self, cut: int | None) -> None:
        for part in _slices(0, self.numel):
            values = self._values(part)  # (replicas, elements) float64
            if cut is None:
                self._write(part, np.median(values, axis=0))
                continue
            values.sort(axis=0)
            self._write(part, values[cut : len(values) - cut].mean(axis=0))

    def _clip(self) -> None:
        norms = [self._norm(i, slice(0, self.numel)) for i in self._weights]
        bound = float(np.median(norms))
        whole = sum(self._weights.values())
        shares = [
            weight / whole * (min(1.0, bound / norm) if norm > 0 else 1.0)
            for weight, norm in zip(self._weights.values(), norms, strict=True)
        ]
        self._weighted(slice(0, self.numel), shares)

    def _mean_of(self, place: slice) -> None:
        whole = sum(self._weights.values())
        self._weighted(place, [weight / whole for weight in self._weights.values()])

    def _radial(self, place: slice) -> None:
        """`(sum_i w_i |d_i| / W) * u / |u|` with `u = sum_i w_i d_i / |d_i|`; where directions cancel out, nothing moves."""
        norms = [self._norm(i, place) for i in self._weights]
        weights = list(self._weights.values())
        length = sum(weight * norm for weight, norm in zip(weights, norms, strict=True)) / sum(weights)
        towards = [weight / norm if norm > 0 else 0.0 for weight, norm in zip(weights, norms, strict=True)]
        squares = sum(float(np.square(self._sum(part, towards)).sum()) for part in _slices(place.start, place.stop))
        # A sum of unit vectors that is rounding alone has no direction.
        known = math.sqrt(squares) > 1e-12 * sum(weights)
        scale = length / math.sqrt(squares) if known else 0.0
        self._weighted(place, [scale * one for one in towards])

    def _weighted(self, place: slice, shares: Sequence[float]) -> None:
        for part in _slices(place.start, place.stop):
            self._write(part, self._start[part] + self._sum(part, shares))

    def _sum(self, part: slice, shares: Sequence[float]) -> _F64:
        """`sum_i shares_i * d_i` in replica order."""
        total = np.zeros(part.stop - part.start)
        for replica, share in zip(self._weights, shares, strict=True):
            total += share * self._change(replica, part)
        return total

    def _norm(self, replica: int, place: slice) -> float:
        squares = sum(float(np.square(self._change(replica, part)).sum()) for part in _slices(place.start, place.stop))
        return math.sqrt(squares)

    def _change(self, replica: int, part: slice) -> _F64:
        """What a replica changed, in float64."""
        own = self._vectors[replica].numpy()[part].astype(np.float64)
        return own if self._differences else own - self._start[part]

    def _values(self, part: slice) -> _F64:
        values = np.stack([self._vectors[i].numpy()[part] for i in self._weights]).astype(np.float64)
        return values + self._start[part] if self._differences else values

    def _write(self, part: slice, values: _F64) -> None:
        np.copyto(self._out.numpy()[part], values, casting="same_kind")


def _slices(start: int, stop: int) -> Iterator[slice]:
    for at in range(start, stop, _SLICE):
        yield slice(at, min(at + _SLICE, stop))


def embeddings_of(module: nn.Module) -> frozenset[str]:
    """Names, as in `named_parameters()`, of the parameters that belong to embeddings, also where another module shares them."""
    tables = {
        id(parameter)
        for child in module.modules()
        if isinstance(child, nn.Embedding | nn.EmbeddingBag)
        for parameter in child.parameters(recurse=False)
    }
    return frozenset(name for name, parameter in module.named_parameters() if id(parameter) in tables)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """A round's new parameters are `sum_i weights[i] * x_i / divisor + rest * start`, with `start` what it began with."""

    weights: tuple[float, ...]
    divisor: float
    rest: float = 0.0
    """0 for a mean."""


def shares_of(updates: Sequence[Update], rows: Sequence[int], weighting: Literal["rows", "equal", "fednova"]) -> Shares:
    """The shares of a round's updates, in replica order.

    Args:
        updates: the headers; one of weight 0 does not count.
        rows: training rows of each replica's shard.
        weighting: "rows": by the rows, or their weights, that were trained on. "equal": all that trained alike. "fednova": Wang et al. (2020, "Tackling the
            objective inconsistency problem in heterogeneous federated optimization"): with `p_i` the replica's part of the
            rows that there are, and `t_i` its steps, the parameters move by
            `(sum_j p_j t_j) * sum_i p_i (x_i - start) / t_i`, so that a replica which takes more steps does not pull the
            optimum its way. With equal steps it is the mean by the rows that there are. Exact for plain SGD; a close correction for others.
    """
    weights = reduced_weights([update.weight for update in updates])
    counted = [i for i, weight in enumerate(weights) if weight > 0]
    if weighting == "equal":
        return Shares(weights=tuple(float(weight > 0) for weight in weights), divisor=float(len(counted)))
    steps = {updates[i].steps for i in counted}
    if weighting == "rows" or not counted:
        return Shares(weights=tuple(weights), divisor=sum(weights))
    # Weighted rows weigh in a shard as they did in the part of it that was trained on.
    parts = {i: rows[i] * updates[i].weight / updates[i].rows for i in counted}
    if len(steps) == 1:
        alike = reduced_weights([parts.get(i, 0.0) for i in range(len(updates))])
        return Shares(weights=tuple(alike), divisor=sum(alike))
    whole = sum(parts.values())
    effective = sum(parts[i] / whole * updates[i].steps for i in counted)
    shares = [0.0] * len(updates)
    for i in counted:
        shares[i] = parts[i] / whole * effective / updates[i].steps
    return Shares(weights=tuple(shares), divisor=1.0, rest=1.0 - sum(shares))
