"""Values that cannot be trained on, counted over all rows so that one message can give the totals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparkdeep.errors import DataError

__all__ = ["Faults"]


@dataclass
class Faults:
    """Counts gathered over batches and partitions; `raise_if_any` turns them into one message.

    After a fault a reader goes on with zeros in its place, so that the totals are complete. What it returns from then
    on is not data: stop writing once `found` is true, and go on reading only to count.
    """

    nulls: dict[str, int] = field(default_factory=dict)
    """Column to number of nulls, whether rows or elements are missing."""
    nans: dict[str, int] = field(default_factory=dict)
    """Column to number of NaN values."""
    lengths: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Array column to its least and greatest length; a fault where these differ. `x[*]` is the level inside `x`.
    Equal lengths are kept too, so that two partitions that disagree are found by `merge`."""
    first: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)
    """Array column to the first row shape that this reader met; it is not sent on."""

    @property
    def found(self) -> bool:
        """Whether anything counted so far cannot be trained on."""
        return bool(self.nulls or self.nans or any(low != high for low, high in self.lengths.values()))

    def count_nulls(self, column: str, count: int) -> None:
        """Add `count` nulls to a column."""
        if count:
            self.nulls[column] = self.nulls.get(column, 0) + count

    def count_nans(self, column: str, count: int) -> None:
        """Add `count` NaN values to a column."""
        if count:
            self.nans[column] = self.nans.get(column, 0) + count

    def note_lengths(self, column: str, low: int, high: int) -> None:
        """Widen the range of lengths met in a column."""
        known_low, known_high = self.lengths.get(column, (low, high))
        self.lengths[column] = (min(low, known_low), max(high, known_high))

    def merge(self, other: Faults) -> None:
        """Add the counts of another reader to these."""
        for column, count in other.nulls.items():
            self.count_nulls(column, count)
        for column, count in other.nans.items():
            self.count_nans(column, count)
        for column, (low, high) in other.lengths.items():
            self.note_lengths(column, low, high)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values from which `from_json` makes equal counts."""
        lengths = {column: list(bounds) for column, bounds in self.lengths.items()}
        return {"nulls": dict(self.nulls), "nans": dict(self.nans), "lengths": lengths}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Faults:
        """Make the counts that `to_json` described."""
        lengths = {column: (int(low), int(high)) for column, (low, high) in value["lengths"].items()}
        return cls(nulls=dict(value["nulls"]), nans=dict(value["nans"]), lengths=lengths)

    def raise_if_any(self) -> None:
        """Raise when anything was counted that cannot be trained on.

        Raises:
            DataError: names every such column with its totals, and what to do.
        """
        if not self.found:
            return
        findings = [f"column {column!r} has {count} null(s)" for column, count in self.nulls.items()]
        findings += [f"column {column!r} has {count} NaN value(s)" for column, count in self.nans.items()]
        uneven = {column: bounds for column, bounds in self.lengths.items() if bounds[0] != bounds[1]}
        findings += [
            f"column {column!r} has arrays of {low} to {high} elements" for column, (low, high) in uneven.items()
        ]
        remedies = []
        if self.nulls or self.nans:
            columns = list(dict.fromkeys([*self.nulls, *self.nans]))
            remedies.append(
                f"every value must be present: drop such rows, df.dropna(subset={columns}), or impute them in Spark"
            )
        if uneven:
            remedies.append(
                "arrays that become one tensor need one length: pad or cut them in Spark (or in decode=), or pass "
                "collate= to pad batch by batch"
            )
        raise DataError(f"{'; '.join(findings)}. {'; '.join(remedies)}.")
