"""`TorchEstimator`: the settings of a fit, checked when they are given; `fit(df)` is `training.train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from pyspark.ml.base import Estimator
from pyspark.sql import DataFrame
from torch import Tensor, nn

from sparkdeep.config import EarlyStopping, LocalSettings, RunSettings, refuse_unknown
from sparkdeep.coordinator import parse_ports
from sparkdeep.data.schema import ColumnNames, names_in
from sparkdeep.errors import ConfigError
from sparkdeep.metrics import RoundRecord
from sparkdeep.prediction import check_choice
from sparkdeep.spark.model import TorchModel
from sparkdeep.spark.training import train

__all__ = ["TorchEstimator"]


class TorchEstimator(Estimator):
    """Trains a PyTorch network on a Spark DataFrame; `fit(df)` gives a `TorchModel`.

    Args:
        model: an nn.Module (a copy is trained), a class or callable that returns one, or "package.module:function".
        loss: `loss(output, label) -> Tensor`, a mean over the batch; not needed with `training_step`.
        optimizer: called with the parameters, e.g. `partial(torch.optim.AdamW, lr=1e-3)`.
        feature_cols: a list of columns, laid side by side as (B, k); one name, in its own shape, a scalar as (B,); or
            {argument of forward: either of these}.
        label_cols: the same forms. A name gives (B,), a list (B, k).
        model_args: keyword arguments for `model`.
        lr_scheduler: called with the optimizer; stepped once a local step, on the cumulative clock.
        outer_optimizer: a torch.optim factory for the driver's step on the averaged parameters; None assigns the mean.
        weight_col: row weights, in the loss and in the mean of replicas.
        validation: a fraction of rows, a boolean column, or a second DataFrame.
        metrics: name -> `f(output, label)` or a torchmetrics Metric, scored on the validation rows.
        early_stopping: an `EarlyStopping`, or its patience in validations.
        training_step: `training_step(model, batch) -> loss`, for losses that need more than (output, label).
        preprocess: on a batch's features, in training, validation and `transform`.
        augment: on a batch's features, in training only.
        decode: bytes -> array, for binary columns: one callable, or {column: callable}.
        collate: list of 1-d tensors -> tensor, for ragged columns: one callable, or {column: callable}.
        prediction: what `transform` writes: None (the output), "argmax", "probability" or a callable.
        prediction_col: its column.
        checkpoint_dir: a local path or URI; a fit that was killed goes on from its newest checkpoint.
        resume: "auto" goes on with a run that `checkpoint_dir` holds; False forgets it and starts over.
        keep_checkpoints: how many to keep.
        callbacks: called with each round's record; returning True ends the run. One with an attribute `needs_spark = True`
            is called while no stage holds the session's slots.
        cpus_per_worker, gpus_per_worker: of each replica's task, by a stage-level resource profile.
        coordinator_host: the driver's name as executors reach it; default spark.driver.host.
        coordinator_port: a port, or a range (first, last), for the coordinator; default any free one.
        shard_dir: shared storage for shards, in place of the executors' local disks.
        worker_process: "auto" trains in a child process when on a GPU, so that no reused Python worker holds a CUDA context;
            "spawn" always, "reuse" never.
        progress: whether to show a progress bar.
        **settings: every field of `LocalSettings` and `RunSettings` (num_workers, batch_size, epochs, sync_every,
            inner_state, replica_state, rounds_per_stage, ...).

    Raises:
        ConfigError: a setting is unknown ("did you mean") or cannot be meant.
    """

    def __init__(
        self,
        *,
        model: nn.Module | Callable[..., Any] | str,
        optimizer: Callable[..., Any],
        feature_cols: ColumnNames,
        label_cols: ColumnNames | None = None,
        loss: Callable[..., Tensor] | None = None,
        model_args: Mapping[str, Any] | None = None,
        lr_scheduler: Callable[..., Any] | None = None,
        outer_optimizer: Callable[..., Any] | None = None,
        weight_col: str | None = None,
        validation: float | str | DataFrame | None = None,
        metrics: Mapping[str, Any] | None = None,
        early_stopping: EarlyStopping | int | None = None,
        training_step: Callable[..., Tensor] | None = None,
        preprocess: Callable[[Any], Any] | None = None,
        augment: Callable[[Any], Any] | None = None,
        decode: Any = None,
        collate: Any = None,
        prediction: Any = None,
        prediction_col: str = "prediction",
        checkpoint_dir: str | None = None,
        resume: str | bool = "auto",
        keep_checkpoints: int = 3,
        callbacks: Sequence[Callable[[RoundRecord], Any]] = (),
        cpus_per_worker: int | None = None,
        gpus_per_worker: int | None = None,
        coordinator_host: str | None = None,
        coordinator_port: int | tuple[int, int] | str | None = None,
        shard_dir: str | None = None,
        worker_process: str = "auto",
        progress: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        local = {f.name for f in fields(LocalSettings)}
        run = {f.name for f in fields(RunSettings)}
        known = local | run | set(type(self).__init__.__kwdefaults__ or {}) | {"model", "optimizer", "feature_cols"}
        refuse_unknown(settings, known, "TorchEstimator setting")
        if early_stopping is not None and not isinstance(early_stopping, EarlyStopping):
            early_stopping = EarlyStopping(patience=early_stopping)
        self.local = LocalSettings(**{k: v for k, v in settings.items() if k in local})
        self.run = RunSettings(early_stopping=early_stopping, **{k: v for k, v in settings.items() if k in run})
        self.model = model
        self.optimizer = optimizer
        self.feature_cols = feature_cols
        self.label_cols = label_cols
        self.loss = loss
        self.model_args = dict(model_args or {})
        self.lr_scheduler = lr_scheduler
        self.outer_optimizer = outer_optimizer
        self.weight_col = weight_col
        self.validation = validation
        self.metrics = dict(metrics or {})
        self.training_step = training_step
        self.preprocess = preprocess
        self.augment = augment
        self.decode = decode
        self.collate = collate
        self.prediction = prediction
        self.prediction_col = prediction_col
        self.checkpoint_dir = checkpoint_dir
        self.resume = resume
        self.keep_checkpoints = keep_checkpoints
        self.callbacks = list(callbacks)
        self.cpus_per_worker = cpus_per_worker
        self.gpus_per_worker = gpus_per_worker
        self.coordinator_host = coordinator_host
        self.coordinator_port = coordinator_port
        self.shard_dir = shard_dir
        self.worker_process = worker_process
        self.progress = progress
        self._check()

    def _check(self) -> None:
        for name in ("optimizer", "lr_scheduler", "outer_optimizer", "loss", "training_step", "preprocess", "augment"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ConfigError(f"{name}={value!r}: must be callable, such as partial(torch.optim.SGD, lr=0.1).")
        if self.loss is None and self.training_step is None:
            raise ConfigError("give loss=, such as nn.CrossEntropyLoss(), or training_step=.")
        if self.training_step is None and self.label_cols is None:
            raise ConfigError("give label_cols=, or training_step= for a loss that needs no label.")
        if (self.metrics or self.run.early_stopping) and self.validation is None:
            raise ConfigError(
                "metrics= and early_stopping= are scored on validation rows: give validation=0.1, for one."
            )
        rule = self.run.early_stopping
        if rule is not None and rule.monitor not in {"loss", *self.metrics}:
            raise ConfigError(f"early_stopping monitors {rule.monitor!r}; known: {['loss', *self.metrics]}.")
        if self.resume not in ("auto", True, False):
            raise ConfigError(f"resume={self.resume!r}: must be 'auto' or False.")
        if self.worker_process not in ("auto", "spawn", "reuse"):
            raise ConfigError(f"worker_process={self.worker_process!r}: must be 'auto', 'spawn' or 'reuse'.")
        used = names_in(self.feature_cols) + names_in(self.label_cols) + names_in(self.weight_col)
        if self.prediction_col in used:
            raise ConfigError(
                f"prediction_col={self.prediction_col!r} is a column that training reads; choose another."
            )
        check_choice(self.prediction)
        parse_ports(self.coordinator_port)

    def fit(self, dataset: DataFrame, params: Any = None, *, warm_start: TorchModel | None = None) -> Any:
        """Train on `dataset`.

        Args:
            dataset: the rows; only the used columns are read.
            params: as for every Spark ML estimator.
            warm_start: start from this model's parameters instead of fresh ones.

        Raises:
            ConfigError, DataError, PreflightError: before anything trains.
            UserCodeError, NonFiniteError, ReplicaLostError: see `sparkdeep.rounds.run_rounds`.
        """
        if warm_start is None:
            return super().fit(dataset, params)
        return train(self, dataset, warm_start)

    def _fit(self, dataset: DataFrame) -> TorchModel:
        return train(self, dataset, None)
