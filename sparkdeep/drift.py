"""Corrections of client drift: what a replica adds to its gradient, so that unlike shards pull less apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from sparkdeep.setting_checks import positive

__all__ = ["DriftCorrection", "FedProx", "Scaffold"]


@dataclass(frozen=True)
class FedProx:
    """Pulls each replica back to where the round began: `gradient += mu * (x - start)` (Li et al., 2020)."""

    mu: float = 0.01
    """Of the paper's 0.001, 0.01, 0.1 and 1."""

    def __post_init__(self) -> None:
        positive("FedProx.mu", self.mu)


@dataclass(frozen=True)
class Scaffold:
    """Control variates (Karimireddy et al., 2020, option II): `gradient += c - c_i`.

    `c_i` is the mean gradient of this replica in its last round, `c` the mean of all replicas'. `c_i` is
    `(start - x) / sum of the steps' rates - (c - c_i)`, which is a mean of gradients for plain SGD only. It stays with
    the replica; one that has lost it begins with `c_i = c`, which corrects nothing. `c` travels with the parameters, both ways.
    """


DriftCorrection: TypeAlias = FedProx | Scaffold
