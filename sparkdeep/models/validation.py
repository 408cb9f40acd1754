"""Scores of the averaged model on validation rows: partial sums on replicas, merged on the driver."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparkdeep.checks import fits, misfit
from sparkdeep.data.batches import Batch
from sparkdeep.errors import ConfigError, ProtocolError, UserCodeError
from sparkdeep.models.denominators import number_of
from sparkdeep.models.losses import LossFunction, forward, logits_of
from sparkdeep.models.scored_rows import ScoredRows, as_seen, joined

__all__ = ["Evaluator", "check_metrics", "described", "has_functions", "is_torchmetric", "merge_scores", "try_metric"]

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
    for name, (_, metric) in _by_head(metrics).items():
        if name in {_LOSS, _WEIGHT}:
            raise ConfigError(f"metric name {name!r} is taken by sparkdeep; choose another.")
        if not is_torchmetric(metric) and not callable(metric):
            raise ConfigError(
                f"metric {name!r} is a {type(metric).__name__}; give a callable f(output, label) -> scalar, which is given all "
                "validation rows, or a torchmetrics.Metric; of one of several outputs, ('its name', metric)."
            )


def has_functions(metrics: Mapping[str, Any]) -> bool:
    """Whether one is a plain function, which is given all validation rows."""
    return any(not is_torchmetric(metric) for _, metric in _by_head(metrics).values())


def _by_head(metrics: Mapping[str, Any]) -> dict[str, tuple[str | None, Any]]:
    """Name -> (which of several outputs it is of, or None; the metric)."""

    def of(one: Any) -> tuple[str | None, Any]:
        named = isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str)
        return one if named else (None, one)

    return {name: of(one) for name, one in metrics.items()}


def _of_head(head: str | None, output: Any, labels: Any) -> tuple[Any, Any]:
    """What a metric is given: of a head that has labels of its name, these."""
    if head is None:
        return output, labels
    named = as_seen(output)
    if not isinstance(named, Mapping) or head not in named:
        raise ConfigError(f"a metric is of the output {head!r}; the model's outputs are {_names(named)}.")
    return named[head], labels[head] if isinstance(labels, Mapping) and head in labels else labels


def _names(output: Any) -> str:
    return str(list(output)) if isinstance(output, Mapping) else f"not named, but a {type(output).__name__}"


class Evaluator:
    """Scores one replica's validation rows: the loss is summed up, torchmetrics count, and for functions the rows are kept."""

    def __init__(self, loss: LossFunction, metrics: Mapping[str, Any], *, has_step: bool) -> None:
        self._loss = loss
        self._has_step = has_step
        named = _by_head(metrics)
        self._metrics = {k: (head, copy.deepcopy(m)) for k, (head, m) in named.items() if is_torchmetric(m)}
        self._seen = ScoredRows() if has_functions(metrics) else None
        for _, metric in self._metrics.values():
            metric.reset()
        self._sums: dict[str, float] = {_WEIGHT: 0.0, _LOSS: 0.0}

    def add(self, model: nn.Module, batch: Batch) -> None:
        """Score one batch; the model is in eval mode and no gradient is kept."""
        output = None
        if not self._has_step or self._seen or self._metrics:
            output = forward(model, batch.features)
        loss = self._loss(model, batch) if self._has_step else self._loss.of_output(output, batch)
        if (count := number_of(loss.count)) > 0:  # of no row that counts the mean is NaN
            self._sums[_WEIGHT] += count
            self._sums[_LOSS] += float(loss.mean) * count
        if self._seen is not None:
            self._seen.add(output, batch.labels)
        for head, metric in self._metrics.values():
            scores, labels = _of_head(head, output, batch.labels)
            scores = logits_of(scores)
            metric.to(scores.device if isinstance(scores, Tensor) else "cpu")
            metric.update(scores, labels.to(scores.device) if head and isinstance(labels, Tensor) else labels)

    def scores(self) -> dict[str, Any]:
        """Sums, metric states and what functions are given, as `state_dicts.pack` takes them."""
        states = {
            name: {
                "count": int(metric._update_count),
                "state": {k: [t.cpu() for t in v] if isinstance(v, list) else v.cpu() for k, v in _state_of(metric)},
            }
            for name, (_, metric) in self._metrics.items()
        }
        return {
            "sums": dict(self._sums),
            "states": states,
            "seen": {} if self._seen is None else self._seen.taken(),
            "logged": self._loss.take_logged(training=False),
        }


def _state_of(metric: Any) -> list[tuple[str, Any]]:
    return [(key, getattr(metric, key)) for key in metric._defaults]


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """What `Evaluator.scores` gives."""

    sums: dict[str, float]
    states: dict[str, dict[str, Any]]
    seen: dict[str, Any]
    logged: dict[str, list[float] | tuple[float, ...]]


def _check_scores(part: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    complaint = misfit(_Scores, part, nan=True)
    if complaint is None:
        counted = {name for name, (_, metric) in _by_head(metrics).items() if is_torchmetric(metric)}
        lacking = {_WEIGHT, _LOSS} - part["sums"].keys() | counted - part["states"].keys()
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
        UserCodeError: a metric that is a function raised.
        ProtocolError: what a replica sent is not a set of scores.
    """
    for part in parts:
        _check_scores(part, metrics)
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in part["sums"].items():
            sums[name] = sums.get(name, 0.0) + value
    weight = sums.pop(_WEIGHT)
    merged = {_LOSS: sums.pop(_LOSS) / weight if weight else float("nan")}
    seen = [part["seen"] for part in parts if part["seen"]]
    output, labels = (joined([as_seen(part[key]) for part in seen]) if seen else None for key in ("output", "labels"))
    for name, (head, metric) in _by_head(metrics).items():
        if not is_torchmetric(metric):
            merged[name] = _score(name, metric, *_of_head(head, output, labels)) if seen else float("nan")
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


def try_metric(name: str, metric: Any, output: Any, labels: Any) -> None:
    """Score the first rows.

    Raises:
        UserCodeError: the metric raised.
        ConfigError: it cannot be given what the model returns.
    """
    ((head, own),) = _by_head({name: metric}).values()
    if is_torchmetric(own):
        # The first rows may lack a class, so that no score can be computed for them yet.
        scores, labels = _of_head(head, output, labels)
        _called(name, copy.deepcopy(own).update, logits_of(scores), labels)
        return
    _score(name, own, *_of_head(head, joined([as_seen(output)]), joined([as_seen(labels)])))


def _score(name: str, function: Callable[..., Any], output: Any, labels: Any) -> float:
    return _called(name, lambda o, y: float(function(o, y)), output, labels)


def _called(name: str, function: Callable[..., Any], output: Any, labels: Any) -> Any:
    try:
        return function(output, labels)
    except Exception as error:
        raise UserCodeError(
            f"{traceback.format_exc().rstrip()}\n\nmetric {name!r} raised {type(error).__name__}: {error} for output "
            f"{described(output)} and labels {described(labels)}; it must return one number.",
            traceback_text=traceback.format_exc(),
        ) from error


def described(value: Any) -> str:
    """Dtypes and shapes of a tensor, or of the tensors in a dict or tuple, for messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {described(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(described, value)) + ")"
    return type(value).__name__


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
