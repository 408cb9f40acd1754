"""How a vector is divided among the replicas of a ring: equal parts, but the last, which may be shorter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

__all__ = ["Partition"]


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
