"""`TorchEstimator`: the settings of a fit, and `fit(df)`, which wires the parts together and nothing else."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from pyspark.ml.base import Estimator
from pyspark.sql import DataFrame, SparkSession
from torch import Tensor, nn

from sparkdeep.checkpoint import CheckpointDirectory
from sparkdeep.config import EarlyStopping, LocalSettings, RunSettings, refuse_unknown
from sparkdeep.coordinator import Coordinator, parse_ports
from sparkdeep.data.schema import ColumnNames, Schema, build_schema
from sparkdeep.errors import ConfigError, ReplicaLostError
from sparkdeep.fitting import Fit, new_run_id, plan_of
from sparkdeep.metrics import RoundRecord
from sparkdeep.prediction import Prediction, check_choice
from sparkdeep.program import Program, pack_program
from sparkdeep.progress import Progress
from sparkdeep.registry import import_factory, reference_of
from sparkdeep.rehearsal import build_model, float_dtype_of, materialize, rehearse, sample_batch
from sparkdeep.spark.barrier import BarrierLauncher, SparkJob, clean_executors
from sparkdeep.spark.hadoop import HadoopStore
from sparkdeep.spark.ingest import Ingested, dealt, read_manifests, shards_of
from sparkdeep.spark.model import TorchModel
from sparkdeep.spark.preflight import check_session, check_slots, task_profile
from sparkdeep.spark.types import column_types
from sparkdeep.store import open_store

__all__ = ["TorchEstimator"]

_LOG = logging.getLogger("sparkdeep")
_INGEST_TIMEOUT_S = 24 * 3600.0
_SLOT_TIMEOUT_S = 30.0


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
        resume: "auto" goes on with a run that `checkpoint_dir` holds; False refuses to.
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
        return self._train(dataset, warm_start)

    def _fit(self, dataset: DataFrame) -> TorchModel:
        return self._train(dataset, None)

    def _train(self, dataset: DataFrame, warm_start: TorchModel | None) -> TorchModel:
        spark = getattr(dataset, "sparkSession", None)
        if spark is None:
            raise ConfigError(
                f"fit was given a {type(dataset).__name__}; it needs a Spark DataFrame: spark.createDataFrame(...)."
            )
        check_session(spark)
        profile = task_profile(spark, self.cpus_per_worker, self.gpus_per_worker)
        check_slots(spark, self.run.num_workers, profile, timeout_s=_SLOT_TIMEOUT_S)
        program = self._program(warm_start)
        schema = self._schema(dataset, program)
        run = new_run_id()
        rows = dealt(
            dataset, schema, validation=self._validation(), num_workers=self.run.num_workers, seed=self.local.seed
        )

        def shards() -> DataFrame:
            return shards_of(rows, schema, run=run, decode=self.decode, shard_dir=self.shard_dir, profile=profile)

        generation = shards()
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: _clean(spark, run, self.shard_dir))
            stack.callback(lambda: launcher.close() if launcher else generation.unpersist())
            launcher: BarrierLauncher | None = None
            ingested = self._ingest(spark, generation, schema, run)
            program, output = self._rehearse(program, ingested)
            launcher = BarrierLauncher(
                spark,
                shards,
                generation=generation,
                plan=plan_of(program, self.local, ingested.schema),
                num_replicas=self.run.num_workers,
                shard_dir=self.shard_dir,
                worker_process=self.worker_process,
                profile=profile,
            )
            fit = self._assemble(spark, stack, program, ingested, launcher, run)
            self._run_rounds(fit)
            fit.load_result()
        return TorchModel(
            module=program.model.eval(),
            schema=ingested.schema,
            prediction=Prediction.of(self.prediction, output),
            prediction_col=self.prediction_col,
            history=fit.state.records,
            batch_size=max(self.local.batch_size, 64),
            preprocess=self.preprocess,
            collate=self.collate,
            decode=self.decode,
            reference=reference_of(self.model, self.model_args),
        )

    # -- parts -----------------------------------------------------------------------------------------------------

    def _validation(self) -> float | str | DataFrame | None:
        value = self.validation
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    def _program(self, warm_start: TorchModel | None) -> Program:
        if self.validation is not None and isinstance(self.validation, float) and math.isnan(self.validation):
            raise ConfigError("validation=nan: give a fraction between 0 and 1.")
        factory = import_factory(self.model) if isinstance(self.model, str) else self.model
        module = build_model(factory, self.model_args, self.local.seed)
        if warm_start is not None:
            _warm(module, warm_start.model)
        return Program(
            model=module,
            loss=self.loss,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            training_step=self.training_step,
            preprocess=self.preprocess,
            augment=self.augment,
            collate=self.collate,
            metrics=self.metrics,
        )

    def _schema(self, dataset: DataFrame, program: Program) -> Schema:
        used = _names_in(self.feature_cols) + _names_in(self.label_cols) + _names_in(self.weight_col)
        wide = str(float_dtype_of(program.model)) == "torch.float64"
        return build_schema(
            types=column_types(dataset.schema, used),
            feature_cols=self.feature_cols,
            label_cols=self.label_cols,
            weight_col=self.weight_col,
            float_dtype="float64" if wide else "float32",
            decode=self.decode,
            collate=self.collate,
        )

    def _ingest(self, spark: SparkSession, generation: DataFrame, schema: Schema, run: str) -> Ingested:
        for attempt in range(self.run.max_retries + 1):
            job = SparkJob(
                spark, generation, tag=f"sparkdeep-{run}-ingest-{attempt}", description="sparkdeep fit: ingest"
            )
            try:
                return read_manifests(job.result(_INGEST_TIMEOUT_S, "ingest"), schema, self.run.num_workers)
            except ReplicaLostError as error:
                if attempt == self.run.max_retries:
                    raise
                _LOG.warning("ingest, attempt %d of %d failed: %s", attempt + 1, self.run.max_retries + 1, error)
            except BaseException:
                job.cancel()
                raise
        raise AssertionError("unreachable")

    def _rehearse(self, program: Program, ingested: Ingested) -> tuple[Program, Any]:
        batch = sample_batch(ingested.sample, ingested.schema, program)
        materialize(program.model, batch, self.local.seed)
        output = rehearse(program, batch, ingested.schema)
        pack_program(program)
        if output is not None:
            Prediction.of(self.prediction, output)
        return program, output

    def _assemble(
        self,
        spark: SparkSession,
        stack: contextlib.ExitStack,
        program: Program,
        ingested: Ingested,
        launcher: BarrierLauncher,
        run: str,
    ) -> Fit:
        conf = spark.sparkContext.getConf()
        host = conf.get("spark.driver.host", "localhost")
        coordinator = Coordinator(
            bind_host=conf.get("spark.driver.bindAddress", host),
            advertised_host=self.coordinator_host or host,
            ports=parse_ports(self.coordinator_port),
        )
        stack.callback(coordinator.close)
        progress = stack.enter_context(Progress(enabled=self.progress))
        fit = Fit(
            program=program,
            local=self.local,
            settings=self.run,
            plan=plan_of(program, self.local, ingested.schema),
            shards=ingested.facts,
            launcher=launcher,
            coordinator=coordinator,
            run=run,
            outer_optimizer=self.outer_optimizer,
            checkpoints=self._checkpoints(spark, program, ingested),
            resume=bool(self.resume),
            on_beat=progress.beat,
            on_log=progress.log,
        )
        self._progress = progress
        rows = sum(shard.rows["train"] for shard in ingested.facts)
        _LOG.info(
            "%d training rows on %d replicas, batch %d each (%d together), %d rounds, %.1f MB of parameters",
            rows,
            self.run.num_workers,
            self.local.batch_size,
            self.local.batch_size * self.run.num_workers,
            fit.schedule.num_rounds,
            fit.layout.num_bytes / 1e6,
        )
        return fit

    def _checkpoints(self, spark: SparkSession, program: Program, ingested: Ingested) -> CheckpointDirectory | None:
        if self.checkpoint_dir is None:
            return None
        from sparkdeep.parameters import Layout

        store = open_store(self.checkpoint_dir, fallback=lambda uri: HadoopStore(spark, uri))
        identity: dict[str, Any] = {
            "layout": Layout.of(program.model).fingerprint(),
            "schema": ingested.schema.to_json(),
            "shards": [[shard.digest, shard.rows] for shard in ingested.facts],
            "num_workers": self.run.num_workers,
            "batch_size": self.local.batch_size,
            "accumulate_batches": self.local.accumulate_batches,
            "sync_every": self.run.sync_every,
            "inner_state": self.local.inner_state,
            "seed": self.local.seed,
        }
        return CheckpointDirectory(store, identity=identity, keep=self.keep_checkpoints)

    def _run_rounds(self, fit: Fit) -> None:
        self._progress.start(fit.schedule.num_rounds, fit.state.committed)
        with contextlib.closing(fit.rounds()) as records:
            for record in records:
                self._progress.advance(record)
                for callback in self.callbacks:
                    if getattr(callback, "needs_spark", False):
                        fit.close_stage()
                    if callback(record) is True:
                        fit.stop(f"callback {getattr(callback, '__name__', type(callback).__name__)} asked for it")


def _warm(module: nn.Module, source: nn.Module) -> None:
    try:
        module.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"warm_start: the model's parameters do not fit this estimator's: {error}. Use the same model and model_args."
        ) from error


def _names_in(columns: ColumnNames | None) -> list[str]:
    if columns is None:
        return []
    if isinstance(columns, str):
        return [columns]
    values = columns.values() if isinstance(columns, Mapping) else columns
    return [name for value in values for name in ([value] if isinstance(value, str) else value)]


def _clean(spark: SparkSession, run: str, shard_dir: str | None) -> None:
    if not clean_executors(spark, run, shard_dir):
        _LOG.warning(
            "not every executor could be cleaned of run %s; the next fit on its host sweeps what is left.", run
        )
