"""A few rows as bytes: the sample that travels to the driver."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from sparkdeep.data.arrow import Array, FieldValues, Ragged
from sparkdeep.errors import DataError

__all__ = ["decode_rows", "encode_rows"]

# Cannot occur in a field's name, which is made of identifiers and dots.
_VALUES, _LENGTHS = "#values", "#lengths"


def encode_rows(fields: Mapping[str, FieldValues]) -> bytes:
    """Return fields as safetensors bytes; ragged ones as values and lengths."""
    arrays: dict[str, Array] = {}
    for name, value in fields.items():
        if isinstance(value, Ragged):
            arrays[name + _VALUES], arrays[name + _LENGTHS] = value
        else:
            arrays[name] = value
    contiguous: dict[str, Any] = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return safetensors.numpy.save(contiguous)


def decode_rows(data: bytes) -> dict[str, FieldValues]:
    """Return the fields that `encode_rows` was given, by name.

    Raises:
        DataError: the bytes are damaged.
    """
    try:
        arrays = safetensors.numpy.load(data)
        fields: dict[str, FieldValues] = {}
        for name, array in arrays.items():
            if name.endswith(_VALUES):
                stem = name.removesuffix(_VALUES)
                fields[stem] = Ragged(array, arrays[stem + _LENGTHS])
            elif not name.endswith(_LENGTHS):
                fields[name] = array
        _check_rows(fields)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"a sample of {len(data)} bytes cannot be read ({error}): ingest the rows again") from error
    return fields


def _check_rows(fields: Mapping[str, FieldValues]) -> None:
    """Refuse fields that do not hold rows, or that hold different numbers of rows."""
    counts = set()
    for name, value in fields.items():
        if isinstance(value, Ragged):
            values, lengths = value
            if values.ndim != 1 or lengths.ndim != 1 or lengths.dtype.kind not in "iu":
                raise ValueError(f"{name} is not made of rows")
            # As Python integers: a sum of damaged lengths may overflow, and then look right.
            if min(lengths.tolist(), default=0) < 0 or sum(lengths.tolist()) != len(values):
                raise ValueError(f"the lengths of {name} do not add up to its {len(values)} values")
        elif value.ndim == 0:
            raise ValueError(f"{name} is not made of rows")
        counts.add(len(value.lengths) if isinstance(value, Ragged) else len(value))
    if len(counts) > 1:
        raise ValueError(f"fields of {sorted(counts)} rows")
