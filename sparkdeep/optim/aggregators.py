"""How a round's updates become one: each aggregator computes it from what the replicas changed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sparkdeep.checks import not_negative
from sparkdeep.optim.changes import Changes, Floats
from sparkdeep.protocol.messages import Update
from sparkdeep.tensors.encoding import CHUNK
from sparkdeep.tensors.mean import Combining, OrderedSum, reduced_weights

if TYPE_CHECKING:
    from sparkdeep.optim.averaging import Averaging
    from sparkdeep.protocol.orders import Globals

__all__ = [
    "Aggregator",
    "Median",
    "NormClip",
    "RadialDirectional",
    "Shares",
    "TrimmedMean",
    "aggregator_of",
    "embeddings_of",
    "shares_of",
]

# Chunks that are summed at the same time: enough for replicas that arrive in bursts, few enough for the caches.
_WINDOW: Final = 4


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


@dataclass(frozen=True)
class TrimmedMean(Aggregator):
    """The mean of every coordinate without the largest and the smallest `share` of its values (Yin et al., 2018)."""

    share: float = 0.2
    """Cut from each end, rounded down to whole replicas; below a half."""

    def __post_init__(self) -> None:
        not_negative("TrimmedMean.share", self.share, below=0.5)

    def combine(self, changes: Changes, weights: Floats) -> Iterator[tuple[slice, Floats]]:
        """Sort, cut, and take the mean; replicas count alike."""
        cut = math.floor(self.share * len(weights))
        for part in changes.slices():
            values = np.sort(changes.parameters(part), axis=0)
            yield part, values[cut : len(values) - cut].mean(axis=0)

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
