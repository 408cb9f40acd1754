"""How a round's updates become one: values to choose from; `robust_mean` computes all but the mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from sparkdeep.setting_checks import not_negative

__all__ = ["Aggregator", "Median", "NormClip", "RadialDirectional", "TrimmedMean"]


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
