"""Outputs and labels of all validation rows, for metrics that are functions of them: gathered in bounded memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor

from sparkdeep.errors import ConfigError

__all__ = ["MOST_BYTES", "Outputs", "ScoredRows", "as_seen", "check_room", "joined"]

MOST_BYTES: Final = 64 << 20
"""Outputs and labels that a replica gathers, at most."""
_REMEDY: Final = (
    "A metric that is a plain function is given all validation rows at once. Validate on fewer rows, or use a "
    "torchmetrics.Metric, which keeps sums in place of rows."
)


class Outputs(dict[Any, Any]):
    """A model's named outputs: by name, as attributes, or by their place."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the model's output has no {name!r}; it has {list(self)}")

    def __missing__(self, key: Any) -> Any:
        if isinstance(key, int) and key < len(self):
            return list(self.values())[key]
        raise KeyError(key)


def as_seen(value: Any) -> Any:
    """An output or labels in the form that metrics are given: tensors on the CPU, in dicts and tuples where there are several."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Mapping):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return Outputs({name: as_seen(part) for name, part in value.items()})
    if isinstance(value, list | tuple):
        return tuple(as_seen(part) for part in value)
    if value is None:
        return None
    raise ConfigError(
        f"a metric that is a plain function needs tensors, and the model's output or its labels hold a {type(value).__name__}. "
        "Return tensors, alone or in a dict, tuple or dataclass, or use a torchmetrics.Metric."
    )


def joined(parts: Sequence[Any]) -> Any:
    """Batches of outputs or of labels as one, along their first dimension.

    Raises:
        ConfigError: they have no rows, or not the same form in every batch.
    """
    first = parts[0]
    if isinstance(first, Mapping):
        return Outputs({name: joined([part[name] for part in parts]) for name in first})
    if isinstance(first, tuple):
        return tuple(joined(list(own)) for own in zip(*parts, strict=True))
    if first is None:
        return None
    shapes = {tuple(part.shape[1:]) if part.dim() else "a number" for part in parts}
    if len(shapes) > 1 or "a number" in shapes:
        raise ConfigError(
            f"the validation rows' outputs or labels cannot be put together for a metric that is a function: their shapes after "
            f"the rows are {sorted(map(str, shapes))[:4]}. Pad them to one length, or use a torchmetrics.Metric."
        )
    return torch.cat(list(parts))


@final
class ScoredRows:
    """What one replica has scored."""

    def __init__(self) -> None:
        self._outputs: list[Any] = []
        self._labels: list[Any] = []
        self._bytes = 0

    def add(self, output: Any, labels: Any) -> None:
        """Keep a batch.

        Raises:
            ConfigError: there is no room for it, or it cannot be kept.
        """
        output, labels = as_seen(output), as_seen(labels)
        self._bytes += _size(output) + _size(labels)
        if self._bytes > MOST_BYTES:
            raise ConfigError(
                f"the validation rows of a replica and their outputs take more than {MOST_BYTES >> 20} MiB. {_REMEDY}"
            )
        self._outputs.append(output)
        self._labels.append(labels)

    def taken(self) -> dict[str, Any]:
        """All of it, as `state_dicts.pack` takes it; empty where nothing was scored."""
        if not self._outputs:
            return {}
        return {"output": joined(self._outputs), "labels": joined(self._labels)}


def check_room(output: Any, labels: Any, rows: int, most_rows: int) -> None:
    """Refuse, before anything trains, what a replica could not gather.

    Args:
        output: of a few rows.
        labels: of the same.
        rows: their number.
        most_rows: validation rows of the largest shard.

    Raises:
        ConfigError: with both numbers.
    """
    needed = (_size(as_seen(output)) + _size(as_seen(labels))) / rows * most_rows
    if needed > MOST_BYTES:
        raise ConfigError(
            f"{most_rows} validation rows of a replica and their outputs take {needed / 2**20:.0f} MiB; at most {MOST_BYTES >> 20} are "
            f"gathered. {_REMEDY}"
        )


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, tuple) else 0
