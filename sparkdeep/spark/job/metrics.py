"""The metrics that a job names: as functions of a batch for validation, as columns for the test rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparkdeep.errors import DataError

__all__ = ["score", "validation_metrics"]


def batch_accuracy(output: Tensor, label: Tensor) -> Tensor:
    """Fraction of rows whose largest output is that of the label; output (B, classes), label (B,) integers."""
    return (output.argmax(dim=1) == label).to(torch.float32).mean()


def batch_mae(output: Tensor, label: Tensor) -> Tensor:
    """Mean absolute error of one batch; output (B,) or (B, 1), label (B,)."""
    return (output.reshape(label.shape) - label).abs().mean()


# No rmse: a validation score is a mean over rows, which a root of a mean is not; the loss stands in for it.
_OF_BATCH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"accuracy": batch_accuracy, "mae": batch_mae}


def validation_metrics(names: Sequence[str]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Returns TorchEstimator's `metrics` for a job's names; rmse is scored on the test rows only."""
    return {name: _OF_BATCH[name] for name in names if name in _OF_BATCH}


def score(predictions: Any, *, label: str, prediction: str, names: Sequence[str]) -> dict[str, float]:
    """Scores a DataFrame of predictions in one pass.

    Args:
        predictions: DataFrame with a scalar label and a prediction, scalar or an array of one element.
        label: the label's column.
        prediction: the prediction's column.
        names: metrics from METRICS, in the order wanted.

    Raises:
        DataError: there are no rows, a label or prediction is null, or the prediction is no single number.
    """
    from pyspark.sql import functions as F

    kind = dict(predictions.dtypes)[prediction]
    value = F.col(f"`{prediction}`")
    if kind.startswith("array<"):
        # A longer array is no single number: null here, counted and refused below.
        value = F.when(F.size(value) == 1, F.element_at(value, 1))
    value, target = value.cast("double"), F.col(f"`{label}`").cast("double")
    columns: Mapping[str, Any] = {
        "accuracy": F.avg((value == target).cast("double")),
        "mae": F.avg(F.abs(value - target)),
        "rmse": F.sqrt(F.avg((value - target) * (value - target))),
    }
    row = predictions.agg(
        F.count(F.lit(1)).alias("rows"),
        F.count(value).alias("values"),
        F.count(target).alias("targets"),
        *(columns[name].alias(name) for name in names),
    ).first()
    if row["rows"] == 0:
        raise DataError("the test rows are none: raise [data] test, or give a path that holds rows")
    for what, column, count in (("prediction", prediction, row["values"]), ("label", label, row["targets"])):
        if count < row["rows"]:
            raise DataError(
                f"{row['rows'] - count} of {row['rows']} test rows have no single number in the {what} column "
                f'{column!r} ({dict(predictions.dtypes)[column]}): for classes set [fit] prediction = "argmax"'
            )
    scores = {name: float(row[name]) for name in names}
    assert all(not math.isinf(number) for number in scores.values())
    return scores
