"""From a model's output to a column: what is written, and of which type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sparkdeep.errors import ConfigError

__all__ = ["Prediction", "check_choice", "check_rows", "to_arrow"]

Choice = str | Callable[[Any], Tensor] | None
_CHOICES = ("argmax", "probability")
_SQL = {"float32": "float", "float64": "double", "int64": "bigint", "bool": "boolean"}


def check_choice(choice: Any) -> None:
    """Refuse a `prediction=` that means nothing.

    Raises:
        ConfigError: with what it may be.
    """
    if choice is None or callable(choice) or choice in _CHOICES:
        return
    raise ConfigError(
        f"prediction={choice!r}: must be None (the output itself), 'argmax', 'probability' or a callable."
    )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What `transform` writes.

    None writes the output itself; "argmax" the class (for one logit: whether it is positive); "probability" the
    softmax over classes (for one logit: the sigmoid); a callable what it makes of the output, row by row in dim 0.
    """

    choice: Choice
    sql_type: str
    """"float" for one number a row, "array<float>" for a vector, and so on; double for float64 models; "" when the output
    cannot be written."""

    @classmethod
    def of(cls, choice: Choice, output: Any, rows: int | None = None) -> Prediction:
        """The prediction for a model with outputs like `output`.

        Args:
            choice: what is to be written.
            output: of the model, for some batch.
            rows: how many rows that batch has; None: not known, and so not compared.

        Raises:
            ConfigError: the output is no tensor with one row per input row, and no callable makes it one.
        """
        values = chosen(output, choice)
        if rows is not None:
            check_rows(values, rows)
        sql = _SQL[_dtype_of(values)]
        for _ in range(values.dim() - 1):
            sql = f"array<{sql}>"
        return cls(choice=choice, sql_type=sql)

    def apply(self, output: Any) -> Tensor:
        """The values to write, shape (B,) or (B, ...)."""
        return chosen(output, self.choice)


def chosen(output: Any, choice: Choice) -> Tensor:
    """Apply `choice` to a batch's output; a trailing dimension of one number a row is dropped."""
    if callable(choice):
        output = choice(output)
    if not isinstance(output, Tensor) or output.dim() == 0:
        raise ConfigError(
            f"the model's output is {type(output).__name__}"
            f"{' of no dimension' if isinstance(output, Tensor) else ''}; transform needs a tensor with one row per input "
            "row. Pass prediction=lambda output: ... that picks one."
        )
    single = output.dim() == 1 or (output.dim() == 2 and output.shape[1] == 1)
    if choice == "argmax":
        return (output.reshape(-1) > 0).long() if single else output.argmax(1)
    if choice == "probability":
        return output.reshape(-1).sigmoid() if single else output.softmax(1)
    return output.reshape(-1) if single else output


def check_rows(values: Tensor, rows: int) -> None:
    """Refuse values that are not one a row.

    Raises:
        ConfigError: with both numbers.
    """
    if len(values) != rows:
        raise ConfigError(
            f"the prediction has {len(values)} values for {rows} input rows; transform needs one a row, in dimension 0. "
            "Pass prediction=lambda output: ... that moves rows there (output.transpose(0, 1) for an RNN without "
            "batch_first), or correct the model's output."
        )


def _dtype_of(values: Tensor) -> str:
    if values.dtype in {torch.float64, torch.bool}:
        return str(values.dtype).removeprefix("torch.")
    return "float32" if values.is_floating_point() else "int64"


def to_arrow(values: Tensor) -> pa.Array:
    """A batch's values as an Arrow array of `Prediction.sql_type`'s Arrow type; no copy per row."""
    dtype = getattr(torch, _dtype_of(values))
    dense = np.ascontiguousarray(values.detach().to("cpu", dtype).numpy())
    array = pa.array(dense.reshape(-1))
    for axis in range(dense.ndim - 1, 0, -1):
        rows, width = int(np.prod(dense.shape[:axis])), dense.shape[axis]
        offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * width)
        array = pa.ListArray.from_arrays(offsets, array)
    return array
