"""Settings as Spark ML `Param`s: one table of names and meanings, camelCase spellings, setters and getters."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

import numpy as np
from pyspark.ml.param import Param, Params

from sparkdeep.checks import hint, spelled
from sparkdeep.errors import ConfigError
from sparkdeep.optim.aggregators import Aggregator
from sparkdeep.optim.drift import DriftCorrection
from sparkdeep.optim.local_work import LocalWork
from sparkdeep.settings.run import refuse_unknown
from sparkdeep.tensors.encoding import CODECS

__all__ = ["ESTIMATOR_PARAMS", "MODEL_PARAMS", "canonical", "check_maps", "values_of", "with_params"]

_PARAMS_CLASS = TypeVar("_PARAMS_CLASS", bound=type[Params])

_COLUMNS: Final = {
    "feature_cols": "feature columns: a name, a list, or {argument of forward: name or list}",
    "prediction_col": "the column that transform writes",
    "probability_col": "column of class probabilities as a Spark ML vector; unset: none is written",
    "raw_prediction_col": "column of the class scores as a Spark ML vector; unset: none is written",
    "prediction": "what transform writes: None (the output), 'argmax', 'probability' or a callable",
}

ESTIMATOR_PARAMS: Final[Mapping[str, str]] = {
    **_COLUMNS,
    "model": "an nn.Module, a class or callable that makes one, or 'package.module:name'",
    "model_args": "keyword arguments for model",
    "loss": "loss(output, label), a mean over the batch",
    "training_step": "training_step(model, batch) -> loss, in place of loss",
    "optimizer": "called with the parameters",
    "learning_rate": "the optimizer's lr, in place of the one it was given with",
    "lr_scheduler": "called with the optimizer; stepped once a local step, or a round with work='gradient'",
    "outer_optimizer": "factory for the driver's step on the averaged parameters; None assigns the mean",
    "algorithm": "a preset such as diloco(), or its name; what is set beside it wins",
    "label_cols": "label columns: a name, a list, or {argument: name or list}",
    "weight_col": "column of row weights",
    "validation": "a fraction of rows, a boolean column, or a second DataFrame",
    "metrics": "name -> f(output, label) or a torchmetrics Metric, scored on validation rows",
    "validate_every": "rounds between validations, or 'epoch'",
    "early_stopping": "an EarlyStopping, or its patience in validations",
    "preprocess": "on a batch's features: in training, validation and transform",
    "augment": "on a batch's features, in training only",
    "decode": "bytes -> array for binary columns: a callable, or {column: callable}",
    "collate": "list of 1-d tensors -> tensor for ragged columns: a callable, or {column: callable}",
    "buffers": "pattern of names -> what replicas' buffers become: 'mean', 'sum', 'max', 'min', 'first', 'local' or a function",
    "num_workers": "replicas; one barrier task each",
    "batch_size": "rows per batch and replica",
    "accumulate_batches": "batches per local step",
    "epochs": "passes over the rows",
    "sync_every": "local steps between averages, or 'epoch'",
    "clip_grad_norm": "largest 2-norm of the gradient in a local step",
    "precision": "'bf16' for autocast",
    "inner_state": "optimizer state between rounds: 'keep', 'average' or 'reset'",
    "replica_state": "'local': on the executor's disk; 'durable': with the checkpoint or the driver",
    "checkpoint_dir": "a path or URI; a fit that was killed goes on from its newest checkpoint",
    "checkpoint_every": "rounds between checkpoints",
    "keep_checkpoints": "checkpoints that are kept",
    "on_checkpoint_error": "'raise' or 'warn': whether a checkpoint that cannot be written ends the fit",
    "resume": "'auto' goes on with a run that checkpoint_dir holds; False starts over",
    "seed": "of row order, random numbers and fresh parameters",
    "block_rows": "contiguous rows read together from a shard larger than window_rows",
    "window_rows": "rows shuffled together",
    "codec": f"of updates: {', '.join(map(repr, CODECS))}",
    "down_codec": "of what changed in the global parameters, on their way to replicas",
    "error_feedback": "whether what codec lost of an update is added to the next one",
    "overlap": "1: a round's update travels while the next one is trained",
    "overlap_mix": "share of a replica's own parameters when it merges; None keeps all its progress",
    "overlap_fragments": "pieces in which vectors travel, spread over the round",
    "aggregation": "'star': on the driver; 'ring': among replicas; 'auto': chosen once",
    "plain_ring": "allows 'ring' where Spark encrypts or authenticates",
    "prefetch": "batches gathered ahead by a thread; 'auto': 2 on a GPU, none on a CPU",
    "device": "'auto', 'cpu' or a torch device",
    "cpus_per_worker": "CPUs of each replica's task, by a resource profile",
    "gpus_per_worker": "GPUs of each replica's task, by a resource profile",
    "worker_process": "'auto', 'spawn' or 'reuse': whether a replica trains in a child process",
    "rounds_per_stage": "rounds in one barrier stage, or 'auto'",
    "max_stage_s": "seconds after which an open stage is closed",
    "max_retries": "repetitions of a failed round in a row",
    "retry_backoff_s": "seconds before the first repetition",
    "open_timeout_s": "seconds for replicas to come",
    "stall_timeout_s": "seconds after which a silent replica counts as lost",
    "min_round_timeout_s": "seconds that a round may always take; otherwise ten times the median of those before it",
    "schedule": f"a rule for the length of rounds: {', '.join(spelled(LocalWork))}",
    "work": "'local': replicas train; 'gradient': they tell gradients, and the outer optimizer steps",
    "portions": "with gradients of all rows, the number of ordinary tasks, or 'auto'",
    "asynchronous": "Asynchronous(n_fetch, n_push): each push is taken when it comes",
    "aggregator": f"'mean', {', '.join(spelled(Aggregator))}",
    "drift_correction": ", ".join(spelled(DriftCorrection)),
    "time_budget_s": "seconds of local work between averages, in place of sync_every",
    "weighting": "'rows', 'equal', 'fednova' (corrected for unequal steps), or 'auto': 'fednova' with own clocks, else 'rows'",
    "quorum": "so many updates close a round without the slowest",
    "quorum_grace_s": "seconds for which a round with its quorum waits for the others",
    "min_workers": "so few replicas the run may go on with when executors do not come back",
    "replacement_timeout_s": "seconds for which a lost executor's replacement is waited for before that",
    "on_nonfinite": "a replica with NaN: 'error', 'drop' it from the round, or 'rollback' the round",
    "divergence_factor": "a round whose loss exceeds the lowest so far times this ends the fit",
    "coordinator_host": "the driver's name as executors reach it",
    "coordinator_port": "a port or a range (first, last) for the coordinator",
    "tls": "whether the coordinator's port is encrypted; 'auto': where Spark encrypts its connections",
    "encrypted_disks": "says that the system encrypts the executors' disks, where spark.io.encryption.enabled asks for it",
    "deal": "'rows': each row goes to a replica by its hash; 'partitions': each partition goes to a replica as it is",
    "deal_key": "a column: rows that are equal in it go to the same replica",
    "shard_dir": "shared storage for shards in place of local disks",
    "transport": "how parameters travel: 'socket' to the driver's port, 'spark' in Spark's own jobs, 'auto' by the session",
    "exchange_dir": "with transport='spark': shared storage of the executors, through which they average",
    "replay": "records of a run whose decisions are taken again, to its bits",
    "callbacks": "called with each round's record; True ends the run, 'checkpoint' has one written; a Callback hears more",
    "progress": "whether to show a progress bar",
}
"""Every setting of `TorchEstimator`."""

MODEL_PARAMS: Final[Mapping[str, str]] = {**_COLUMNS, "batch_size": "rows per forward pass in transform"}
"""Every setting of `TorchModel`."""

_SPELLINGS: Final = {
    "featuresCol": "feature_cols",
    "features_col": "feature_cols",
    "labelCol": "label_cols",
    "label_col": "label_cols",
    "lr": "learning_rate",
}
"""Beside the camelCase form of each name: what Spark ML and its users write."""


def _camel(name: str) -> str:
    return re.sub(r"_([a-z])", lambda match: match[1].upper(), name)


def _plain(value: Any) -> Any:
    # A grid made with numpy holds numpy's numbers, which isinstance does not take for ints.
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, tuple) else value  # explainParams formats values with %


def with_params(table: Mapping[str, str]) -> Callable[[_PARAMS_CLASS], _PARAMS_CLASS]:
    """Class decorator: a `Param` for each name, read also by its camelCase spelling, and `setX`, `getX`.

    `params`, `explainParams()` and saved metadata show the snake_case names only. An attribute that is not there is
    refused with the nearest name, and so is a value that is assigned where the `Param` is.
    """

    def decorate(cls: _PARAMS_CLASS) -> _PARAMS_CLASS:
        for name, doc in table.items():
            setattr(cls, name, Param(Params._dummy(), name, doc, typeConverter=_plain))
        other = spellings(table)
        for spelling, name in other.items():
            setattr(cls, spelling, property(operator.attrgetter(name)))
        names = {name: name for name in table} | other
        for spelling, name in names.items():
            if spelling in table or spelling in _SPELLINGS:  # setFeaturesCol, setLabelCol: as Spark's estimators
                title = _camel(f"_{spelling}")
                setattr(cls, f"set{title}", _setter(name))
                setattr(cls, f"get{title}", _getter(name))
        methods = {"__getattr__": _missing, "__setattr__": _assigner(cls, names)}
        for name, method in methods.items():
            setattr(cls, name, method)
        return cls

    return decorate


def _setter(name: str) -> Callable[..., Any]:
    def set_param(self: Any, value: Any) -> Any:
        return self._set(**{name: value})

    set_param.__doc__ = f"Set `{name}`; returns this object."
    return set_param


def _getter(name: str) -> Callable[..., Any]:
    def get_param(self: Any) -> Any:
        return self.getOrDefault(getattr(self, name))

    get_param.__doc__ = f"The value of `{name}`."
    return get_param


def _missing(self: Any, name: str) -> Any:
    """Called by Python for a name that is not there; suggests which one may be meant."""
    near = "" if name.startswith("__") else hint(name, dir(type(self)))
    raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.{near}")


def _assigner(cls: type, names: Mapping[str, str]) -> Callable[[Any, str, Any], None]:
    plain: Any = cls.__setattr__

    def assign(self: Any, name: str, value: Any) -> None:
        if name in names and not isinstance(value, Param):  # it would hide the Param, and no fit would see it
            raise AttributeError(
                f"{name} is a Spark ML Param, so that {name} = ... sets nothing: call set{_camel(f'_{names[name]}')}(...)."
            )
        plain(self, name, value)

    return assign


def spellings(table: Mapping[str, str]) -> dict[str, str]:
    """Other spelling -> name, for every name of `table`."""
    camel = {_camel(name): name for name in table if "_" in name}
    return camel | {spelling: name for spelling, name in _SPELLINGS.items() if name in table}


def canonical(given: Mapping[str, Any], table: Mapping[str, str], where: str) -> dict[str, Any]:
    """The given settings under their snake_case names.

    Raises:
        ConfigError: a name that is unknown ("did you mean"), or given in two spellings.
    """
    known = spellings(table)
    refuse_unknown(given, [*table, *known], where)
    result: dict[str, Any] = {}
    for spelling, value in given.items():
        name = known.get(spelling, spelling)
        if name in result:
            raise ConfigError(f"{name} is given twice, in two spellings ({', '.join(given)}): keep one.")
        result[name] = value
    return result


def values_of(params: Params) -> dict[str, Any]:
    """Every param's value by name: what was set, else the default."""
    return {param.name: value for param, value in params.extractParamMap().items()}


def check_maps(owner: Params, maps: Iterable[Mapping[Any, Any]]) -> None:
    """Refuse what a grid asks of a param that `owner` does not have; Spark would silently ignore it.

    Raises:
        ConfigError: with the nearest known name.
    """
    known = [param.name for param in owner.params]
    for one in maps:
        for param in one:
            if not isinstance(param, Param):
                raise ConfigError(
                    f"a param map has the key {param!r}; its keys are Params: {{estimator.epochs: 3}}, or "
                    "ParamGridBuilder().addGrid(estimator.epochs, [1, 3])."
                )
            refuse_unknown([param.name], known, f"param of {type(owner).__name__} in a param map")
            if param.parent != owner.uid:
                raise ConfigError(
                    f"a param map sets {param.name!r} of {param.parent}, and this is {owner.uid}: build the grid from the "
                    "estimator that is fitted."
                )
