"""Which faults a soak has, and when; and how much something grew."""

from __future__ import annotations

import random
from typing import Final

__all__ = ["KINDS", "ROUNDS_AN_EPOCH", "STALL_S", "plan_faults", "slope"]

ROUNDS_AN_EPOCH: Final = 10
STALL_S: Final = 6.0
KINDS: Final = (
    "worker killed in training",
    "worker killed while sending",
    "worker stopped",
    "executor killed",
    "executor killed with its disk",
    "update corrupted",
    "replica delayed",
)


def slope(values: list[float]) -> float:
    """Of the least-squares line through values at 0, 1, 2, ..."""
    count = len(values)
    middle, mean = (count - 1) / 2, sum(values) / count
    return sum((x - middle) * (y - mean) for x, y in enumerate(values)) / sum((x - middle) ** 2 for x in range(count))


def plan_faults(rounds: int, seed: int) -> list[tuple[int, str, int]]:
    """(round, kind, replica) in order: one about every 3 to 6 rounds, each kind as often as chance has it; none in the first."""
    chance = random.Random(seed)  # noqa: S311 (repeatable by its seed)
    planned = []
    at = chance.randint(2, 5)
    while at < rounds:
        # In an epoch's last round the smaller shard may be out of rows, and then sends nothing.
        at += at % ROUNDS_AN_EPOCH == 0
        planned.append((at, chance.choice(KINDS), chance.randrange(2)))
        at += chance.randint(3, 6)
    return planned
