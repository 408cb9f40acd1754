"""Fields to tensors: what a model, a loss and a metric are given."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparkdeep.data.arrow import Array, FieldValues, Ragged
from sparkdeep.data.schema import Callables, Field, Schema, callable_for
from sparkdeep.errors import UserCodeError

__all__ = ["Batch", "make_batch"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Rows as tensors, all on one device; dim 0 is the row."""

    features: Any
    """A tensor, or a dict from argument of `forward` to tensor. With `collate`, what that returned."""
    labels: Any
    """A tensor, a dict of them, or None."""
    weights: Tensor | None
    """(rows,) as stored, float32 or float64: sums of weights must not be rounded to bfloat16."""
    rows: int
    """Number of rows."""
    epoch: int = 0
    """From 0; of training batches, as is `index`."""
    index: int = 0
    """Which batch of its epoch on this replica, from 0."""

    def pinned(self) -> Batch:
        """Return the batch in page-locked memory, from which a GPU copies while others compute."""
        return replace(
            self,
            features=_each(self.features, Tensor.pin_memory),
            labels=_each(self.labels, Tensor.pin_memory),
            weights=_each(self.weights, Tensor.pin_memory),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the batch on a device; `non_blocking` as for `Tensor.to`."""

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking)

        return replace(
            self,
            features=_each(self.features, move),
            labels=_each(self.labels, move),
            weights=_each(self.weights, move),
        )


def make_batch(
    fields: Mapping[str, FieldValues],
    schema: Schema,
    *,
    float_dtype: torch.dtype,
    collate: Callables = None,
    place: tuple[int, int] = (0, 0),
) -> Batch:
    """Turn fields into tensors, sharing the memory of writable arrays.

    Args:
        fields: those of the schema; label and weight fields may be left out, as they are when predicting.
        schema: says which field is what.
        float_dtype: for floating-point features and labels; integers and booleans stay what they are.
        collate: for ragged fields, a list of 1-d tensors to a tensor: one callable, or one per column.
        place: the batch's epoch and its number there.

    Raises:
        UserCodeError: `collate` raised.
    """
    # Role to argument to tensor; the argument None stands for a tensor that is given without a name.
    parts: dict[str, dict[str | None, Any]] = {"features": {}, "label": {}, "weight": {}}
    for field in schema.fields:
        value = fields.get(field.name)
        if isinstance(value, Ragged):
            parts[field.role][field.argument] = _collated(value, field, float_dtype, collate)
        elif value is not None:
            tensor = _as_tensor(value)
            # (weights keep their dtype, and calling `to` costs more than looking at the dtype)
            if tensor.dtype is not float_dtype and tensor.is_floating_point() and field.role != "weight":
                tensor = tensor.to(float_dtype)
            parts[field.role][field.argument] = tensor
    first = fields[schema.fields[0].name]
    return Batch(
        features=_named(parts["features"]),
        labels=_named(parts["label"]),
        weights=_named(parts["weight"]),
        rows=len(first.lengths) if isinstance(first, Ragged) else len(first),
        epoch=place[0],
        index=place[1],
    )


def _named(part: dict[str | None, Any]) -> Any:
    return part.get(None, part) if part else None


def _collated(value: Ragged, field: Field, float_dtype: torch.dtype, collate: Callables) -> Any:
    flat = _as_tensor(value.values)
    flat = flat.to(float_dtype) if flat.is_floating_point() else flat
    function = callable_for(field.columns[0], collate)
    assert function is not None, "build_schema makes a field ragged only when collate= is given for it"
    try:
        return function(list(torch.split(flat, value.lengths.tolist())))
    except Exception as error:
        raise UserCodeError(
            f"collate= raised {type(error).__name__} on column {field.columns[0]!r}, {len(value.lengths)} rows of "
            f"{field.dtype}: {error}. It is given a list of 1-d tensors and must return one tensor",
            traceback_text=traceback.format_exc(),
        ) from error


def _as_tensor(array: Array) -> Tensor:
    # A read-only array is a view of Arrow's memory or of a file; a model that works in place must not write there.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to every tensor in a dict, tuple or list, and to whatever else has a `to`."""
    if isinstance(value, dict):
        return {key: _each(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_each(item, change) for item in value)
    if isinstance(value, list):
        return [_each(item, change) for item in value]
    return change(value) if hasattr(value, "to") else value
