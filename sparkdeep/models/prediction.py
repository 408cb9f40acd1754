"""From a model's output to columns: what is written, and with which type."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparkdeep.errors import ConfigError
from sparkdeep.models.losses import logits_of

__all__ = ["Prediction", "Scores", "check_choice", "check_rows", "check_scores", "scores_for", "to_arrow"]

Written = Tensor | Mapping[str, Tensor]

Choice = str | Callable[[Any], Tensor] | None
Scores = Literal["logits", "probability"]
_ENOUGH = 4
"""Different numbers from which on something is told by their values."""
_CHOICES = ("argmax", "probability")
_SQL = {"float32": "float", "float64": "double", "int64": "bigint", "bool": "boolean"}


def scores_for(loss: Any) -> Scores | None:
    """What a network's numbers are, by the loss that takes them; None where it does not tell."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    if isinstance(loss, nn.BCELoss) or loss is F.binary_cross_entropy:
        return "probability"
    # Of log-probabilities, which NLLLoss takes, the softmax is the probabilities too.
    kinds = nn.BCEWithLogitsLoss | nn.CrossEntropyLoss | nn.NLLLoss | nn.MultiLabelSoftMarginLoss | nn.MultiMarginLoss
    functions = {F.binary_cross_entropy_with_logits, F.cross_entropy, F.nll_loss}
    return "logits" if isinstance(loss, kinds) or loss in functions else None


def check_scores(value: Any) -> Scores | None:
    """A stored word for what a network's numbers are.

    Raises:
        ValueError: it is none.
    """
    if value not in {None, "logits", "probability"}:
        raise ValueError(f"scores={value!r}")
    return cast("Scores | None", value)


def check_choice(choice: Any, vectors: Sequence[str] = ()) -> None:
    """Refuse a `prediction=` that means nothing.

    Args:
        choice: the setting.
        vectors: what else is written for a classifier; see `Prediction`.

    Raises:
        ConfigError: with what it may be.
    """
    if not (choice is None or callable(choice) or choice in _CHOICES):
        raise ConfigError(
            f"prediction={choice!r}: must be None (the output itself), 'argmax', 'probability' or a callable."
        )
    if vectors and choice == "probability":
        raise ConfigError(
            f"prediction='probability' with {'_col and '.join(vectors)}_col: prediction_col then holds the class, as Spark's "
            "evaluators expect; leave prediction out, or use probability_col alone."
        )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What `transform` writes.

    None writes the output itself; "argmax" the class (for one logit: whether it is positive); "probability" the
    softmax over classes (for one logit: the sigmoid); a callable writes what it returns for the output, with rows in
    dim 0.

    With `vectors`, it writes what Spark ML's classifiers write: the class as a double, and beside it the named vectors.
    The output, or what a callable makes of it, then holds the scores of the classes before softmax, or one logit a row,
    which stands for the two classes [-z, z].
    """

    choice: Choice
    sql_type: str
    """"float" for one number per row, "array<float>" for a vector, and so on; double for float64 models; "" when the output
    cannot be written. With `vectors` a struct of prediction and vectors."""
    vectors: tuple[str, ...] = ()
    """Which of "probability" and "raw_prediction" are written too."""
    scores: Scores | None = None
    """What the network's numbers are: "logits", or "probability" after its own sigmoid or softmax; None: as logits."""

    @classmethod
    def of(
        cls,
        choice: Choice,
        output: Any,
        rows: int | None = None,
        vectors: Sequence[str] = (),
        scores: Scores | None = None,
    ) -> Prediction:
        """The prediction for a model with outputs like `output`.

        Args:
            choice: what is to be written.
            output: of the model, for some batch.
            rows: how many rows that batch has; None: not known, and therefore not compared.
            vectors: what else is to be written for a classifier.
            scores: what the output's numbers are, where the loss has told it.

        Raises:
            ConfigError: the output is not a tensor with one row per input row, and no callable makes it one; or, with
                `vectors`, it cannot be class scores; or it could be logits and probabilities alike.
        """
        check_choice(choice, vectors)
        if scores is None and (choice in _CHOICES or vectors):
            scores = _told_by_values(logits_of(output), choice, vectors)
        if vectors:
            found = class_scores(output, choice, scores)
            if rows is not None:
                check_rows(found, rows)
            members = "".join(f", {name}: array<double>" for name in vectors)
            sql = f"struct<prediction: double{members}>"
            return cls(choice=choice, sql_type=sql, vectors=tuple(vectors), scores=scores)
        values = chosen(output, choice, scores)
        if rows is not None:
            check_rows(values, rows)
        sql = _SQL[_dtype_of(values)]
        for _ in range(values.dim() - 1):
            sql = f"array<{sql}>"
        return cls(choice=choice, sql_type=sql, scores=scores)

    def apply(self, output: Any) -> Written:
        """The values to write, (B,) or (B, ...); with `vectors` by name: (B,), and (B, classes) for each vector."""
        if self.vectors:
            return classified(class_scores(output, self.choice, self.scores), self.vectors)
        return chosen(output, self.choice, self.scores)


def _told_by_values(output: Any, choice: Choice, vectors: Sequence[str]) -> Scores:
    """What the numbers of some rows are: rows of probabilities add up to 1, and logits do not keep between 0 and 1.

    Raises:
        ConfigError: one number a row, and all of them between 0 and 1.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.numel() == 0 or callable(choice):
        return "logits"
    inside = bool(((output >= 0) & (output <= 1)).all())
    if output.dim() == 2 and output.shape[1] > 1:
        ones = torch.ones(len(output), dtype=output.dtype, device=output.device)
        return "probability" if inside and torch.allclose(output.sum(1), ones, atol=1e-3) else "logits"
    if not inside or output.unique().numel() < _ENOUGH:
        return "logits"
    asked = " and ".join(f"{name}_col" for name in vectors) or f"prediction={choice!r}"
    raise ConfigError(
        f"{asked}: the outputs for the first rows lie between 0 and 1, and could be probabilities or logits. Use nn.BCELoss() or "
        "nn.BCEWithLogitsLoss(), which tell it, or say it: prediction=lambda output: (output > 0.5).long(), for one."
    )


def class_scores(output: Any, choice: Choice, known: Scores | None = None) -> Tensor:
    """The scores of the classes before softmax, (B, classes), or of one logit a row, (B,).

    Raises:
        ConfigError: the output, or what `choice` makes of it, cannot be that.
    """
    scores = chosen(output, choice if callable(choice) else None)
    if scores.dim() > 2 or not scores.is_floating_point() or scores.numel() == 0 < len(scores):
        raise ConfigError(
            f"the output has shape {tuple(scores.shape)} and dtype {str(scores.dtype).removeprefix('torch.')}: "
            "probability_col and raw_prediction_col need the scores of the classes before softmax, (rows, classes) in "
            "floating point, or one logit a row. Pass prediction=lambda output: ... that picks them, or unset both."
        )
    if known == "probability":
        return scores.logit() if scores.dim() == 1 else scores.log()
    return scores


def classified(scores: Tensor, vectors: Sequence[str]) -> dict[str, Tensor]:
    """The class of each row, (B,) float64, and the named vectors, (B, classes)."""
    raw = torch.stack([-scores, scores], 1) if scores.dim() == 1 else scores
    values = {"probability": raw.sigmoid() if scores.dim() == 1 else raw.softmax(1), "raw_prediction": raw}
    return {"prediction": raw.argmax(1).double(), **{name: values[name] for name in vectors}}


def chosen(output: Any, choice: Choice, scores: Scores | None = None) -> Tensor:
    """Apply `choice` to a batch's output; a trailing dimension of one number per row is dropped."""
    whole = output
    output = choice(output) if callable(choice) else logits_of(output)
    if output is not whole and choice in _CHOICES and output.dim() > 2:
        raise ConfigError(
            f"prediction={choice!r} of logits of shape {tuple(output.shape)}: which dimension holds the classes is not said. "
            "Pass prediction=lambda output: output.logits.argmax(-1), for one."
        )
    if not isinstance(output, Tensor) or output.dim() == 0:
        raise ConfigError(
            f"the model's output is {type(output).__name__}"
            f"{' of no dimension' if isinstance(output, Tensor) else ''}; transform needs a tensor with one row per input "
            "row. Pass prediction=lambda output: ... that picks one."
        )
    if output.is_complex():
        raise ConfigError(
            f"the output has dtype {str(output.dtype).removeprefix('torch.')}, and a column holds real numbers: pass "
            "prediction=lambda output: torch.view_as_real(output), or output.abs()."
        )
    single = output.dim() == 1 or (output.dim() == 2 and output.shape[1] == 1)
    if choice == "argmax":
        between = 0.5 if scores == "probability" else 0.0
        return (output.reshape(-1) > between).long() if single else output.argmax(1)
    if choice == "probability" and scores != "probability":
        return output.reshape(-1).sigmoid() if single else output.softmax(1)
    return output.reshape(-1) if single else output


def check_rows(written: Written, rows: int) -> None:
    """Refuse values that are not one per row.

    Raises:
        ConfigError: with both numbers.
    """
    values = written if isinstance(written, Tensor) else written["prediction"]
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


def to_arrow(written: Written) -> pa.Array:
    """A batch's values as an Arrow array of `Prediction.sql_type`'s Arrow type; no copy per row."""
    if not isinstance(written, Tensor):  # a Spark ML vector holds doubles
        return pa.StructArray.from_arrays([_dense(values.double()) for values in written.values()], names=list(written))
    return _dense(written)


def _dense(values: Tensor) -> pa.Array:
    dtype = getattr(torch, _dtype_of(values))
    dense = np.ascontiguousarray(values.detach().to("cpu", dtype).numpy())
    array = pa.array(dense.reshape(-1))
    for axis in range(dense.ndim - 1, 0, -1):
        rows, width = int(np.prod(dense.shape[:axis])), dense.shape[axis]
        offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * width)
        array = pa.ListArray.from_arrays(offsets, array)
    return array
