"""Scores of the averaged model on validation rows: partial sums on replicas, merged on the driver."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparkdeep.checks import fits, misfit
from sparkdeep.data.batches import Batch
from sparkdeep.errors import ConfigError, ProtocolError
from sparkdeep.models.denominators import number_of
from sparkdeep.models.losses import LossFunction, forward, logits_of

__all__ = ["Evaluator", "check_metrics", "is_torchmetric", "merge_scores"]

_ROWS = "rows"
_WEIGHT = "weight"
_LOSS = "loss"


def is_torchmetric(metric: Any) -> bool:
    """Whether `metric` keeps states that can be merged, without importing torchmetrics."""
    return hasattr(metric, "_reductions") and hasattr(metric, "metric_state")


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Refuse a metric that is neither a callable nor a torchmetrics Metric.

    Raises:
        ConfigError: with the metric's name.
    """
    for name, metric in metrics.items():
        if name in {_LOSS, _ROWS, _WEIGHT}:
            raise ConfigError(f"metric name {name!r} is taken by sparkdeep; choose another.")
        if not is_torchmetric(metric) and not callable(metric):
            raise ConfigError(
                f"metric {name!r} is a {type(metric).__name__}; give a callable f(output, label) -> scalar, whose "
                "row-weighted mean is reported, or a torchmetrics.Metric."
            )


class Evaluator:
    """Sums up one replica's validation rows.

    A callable metric is averaged over batches, weighted by rows; for a metric that is no mean over rows (AUC, F1)
    use torchmetrics, whose states are merged across replicas.
    """

    def __init__(self, loss: LossFunction, metrics: Mapping[str, Any], *, has_step: bool) -> None:
        self._loss = loss
        self._has_step = has_step
        self._functions: dict[str, Callable[..., Any]] = {k: m for k, m in metrics.items() if not is_torchmetric(m)}
        self._metrics = {k: copy.deepcopy(m) for k, m in metrics.items() if is_torchmetric(m)}
        for metric in self._metrics.values():
            metric.reset()
        self._sums: dict[str, float] = dict.fromkeys([_ROWS, _WEIGHT, _LOSS, *self._functions], 0.0)

    def add(self, model: nn.Module, batch: Batch) -> None:
        """Score one batch; the model is in eval mode and no gradient is kept."""
        output = None
        if not self._has_step or self._functions or self._metrics:
            output = forward(model, batch.features)
        loss = self._loss(model, batch) if self._has_step else self._loss.of_output(output, batch)
        self._sums[_ROWS] += batch.rows
        if (count := number_of(loss.count)) > 0:  # of no row that counts the mean is NaN
            self._sums[_WEIGHT] += count
            self._sums[_LOSS] += float(loss.mean) * count
        for name, function in self._functions.items():
            self._sums[name] += float(function(output, batch.labels)) * batch.rows
        for metric in self._metrics.values():
            scores = logits_of(output)
            metric.to(scores.device if isinstance(scores, Tensor) else "cpu")
            metric.update(scores, batch.labels)

    def scores(self) -> dict[str, Any]:
        """Sums and metric states, as `state_dicts.pack` takes them."""
        states = {
            name: {
                "count": int(metric._update_count),
                "state": {k: [t.cpu() for t in v] if isinstance(v, list) else v.cpu() for k, v in _state_of(metric)},
            }
            for name, metric in self._metrics.items()
        }
        return {"sums": dict(self._sums), "states": states, "logged": self._loss.take_logged(training=False)}


def _state_of(metric: Any) -> list[tuple[str, Any]]:
    return [(key, getattr(metric, key)) for key in metric._defaults]


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """What `Evaluator.scores` gives."""

    sums: dict[str, float]
    states: dict[str, dict[str, Any]]
    logged: dict[str, list[float] | tuple[float, ...]]


def _check_scores(part: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    complaint = misfit(_Scores, part, nan=True)
    if complaint is None:
        functions = {name for name, metric in metrics.items() if not is_torchmetric(metric)}
        lacking = {_ROWS, _WEIGHT, _LOSS, *functions} - part["sums"].keys() or metrics.keys() - functions - part[
            "states"
        ].keys()
        odd = [name for name, pair in part["logged"].items() if len(pair) != 2 or not pair[1] > 0]
        odd += [
            name for name, state in part["states"].items() if not fits(state.get("count"), int) or "state" not in state
        ]
        complaint = f"{sorted(lacking)} are missing, or {odd} no means." if lacking or odd else None
    if complaint:
        raise ProtocolError(f"a replica sent what are no scores: {complaint}")


def merge_scores(parts: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> dict[str, float]:
    """Merge the replicas' scores, in replica order, into `{"loss": ..., metric: ...}`.

    Raises:
        ConfigError: a torchmetrics Metric that gives more than one number.
        ProtocolError: what a replica sent is not a set of scores.
    """
    for part in parts:
        _check_scores(part, metrics)
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in part["sums"].items():
            sums[name] = sums.get(name, 0.0) + value
    rows, weight = sums.pop(_ROWS), sums.pop(_WEIGHT)
    merged = {_LOSS: sums.pop(_LOSS) / weight if weight else float("nan")}
    for name, metric in metrics.items():
        if not is_torchmetric(metric):
            merged[name] = sums[name] / rows if rows else float("nan")
            continue
        total = copy.deepcopy(metric).cpu()
        total.reset()
        stored = [part["states"][name] for part in parts if part["states"][name]["count"]]
        for key, reduction in total._reductions.items():
            setattr(total, key, _reduced([part["state"][key] for part in stored], reduction, getattr(total, key)))
        total._update_count = sum(part["count"] for part in stored)
        value = total.compute()
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ConfigError(
                f"metric {name!r} gives {value!r}; a round record holds one number a metric. Average over classes "
                "(average='macro') or give one metric a number."
            )
        merged[name] = float(value)
    for name in [name for part in parts for name in part["logged"] if name not in merged]:
        pairs = [part["logged"][name] for part in parts if name in part["logged"]]
        merged[name] = sum(total for total, _ in pairs) / sum(count for _, count in pairs)
    return merged


def _reduced(values: Sequence[Any], reduction: Callable[[Any], Any] | None, default: Any) -> Any:
    """One metric state of all replicas, as torchmetrics itself reduces it across processes (`Metric._sync_dist`)."""
    if len(values) < 2:
        return values[0] if values else default
    if isinstance(values[0], Tensor):
        whole: Any = torch.stack(list(values))
    else:
        whole = [tensor for value in values for tensor in value]
        if not whole:
            return whole
    return reduction(whole) if reduction is not None else whole
