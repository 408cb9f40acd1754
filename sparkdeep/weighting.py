"""How much each replica's update counts in a round: by rows, alike, or corrected for unequal steps (FedNova)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparkdeep.averaging import reduced_weights
from sparkdeep.messages import Update

__all__ = ["Shares", "shares_of"]


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
