"""`TorchEstimator`: the settings of a fit as Spark ML params, checked when they are given; `fit(df)` is `training.train`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

from pyspark import keyword_only
from pyspark.ml.base import Estimator
from pyspark.ml.util import MLReadable, MLWritable
from pyspark.sql import DataFrame
from torch import Tensor, nn

from sparkdeep.algorithms import Algorithm, preset_of
from sparkdeep.data.schema import ColumnNames
from sparkdeep.errors import ConfigError
from sparkdeep.settings.run import EarlyStopping, LocalSettings, RunSettings
from sparkdeep.spark.fit.estimator_files import EstimatorReader, EstimatorWriter
from sparkdeep.spark.fit.settings import FitSettings
from sparkdeep.spark.fit.training import train
from sparkdeep.spark.model.model import TorchModel
from sparkdeep.spark.model.params import ESTIMATOR_PARAMS, canonical, check_maps, values_of, with_params
from sparkdeep.tracking.callbacks import Callback
from sparkdeep.tracking.records import RoundRecord

__all__ = ["TorchEstimator"]


@with_params(ESTIMATOR_PARAMS)
class TorchEstimator(Estimator, MLWritable, MLReadable):
    """Trains a PyTorch network on a Spark DataFrame; `fit(df)` gives a `TorchModel`.

    Every argument is a Spark ML `Param` of the same name: `estimator.epochs` is the param, `getEpochs()` its value,
    `setEpochs(3)` sets it, grids name it. camelCase spellings (`batchSize`, `labelCol`, `featuresCol`) are accepted
    wherever a name is.

    Args:
        model: an nn.Module (a copy is trained), a class or callable that returns one, or "package.module:function".
        loss: `loss(output, label) -> Tensor`, a mean over the batch; not needed with `training_step`, nor for models
            that bring their own.
        optimizer: called with the parameters, e.g. `partial(torch.optim.AdamW, lr=1e-3)`.
        feature_cols: a list of columns, laid side by side as (B, k); one name, in its own shape, a scalar as (B,); or
            {argument of forward: either of these}.
        label_cols: the same forms. A name gives (B,), a list (B, k).
        model_args: keyword arguments for `model`.
        learning_rate: the optimizer's `lr`, in place of the one it was given with; what a grid searches over.
        lr_scheduler: called with the optimizer; stepped once a local step, on the cumulative clock. With `work="gradient"` it is
            called with the outer optimizer, and stepped once a round.
        algorithm: a preset of `sparkdeep.algorithms` such as `diloco()`, or its name: defaults for other arguments, of which
            those that you set win.
        outer_optimizer: a torch.optim factory for the driver's step on the averaged parameters; None assigns the mean.
        weight_col: row weights, in the loss and in the mean of replicas.
        validation: a fraction of rows, a boolean column, or a second DataFrame.
        metrics: name -> `f(output, label)` or a torchmetrics Metric, scored on the validation rows. A function is given all of them at
            once, of all replicas (64 MiB a replica at most); a pair (head, metric) is of one of several outputs.
        early_stopping: an `EarlyStopping`, or its patience in validations.
        training_step: `training_step(model, batch) -> loss`, for losses that need more than (output, label). It may return
            (sum, count), as `loss` may, where the mean is not over rows.
        preprocess: on a batch's features, in training, validation and `transform`.
        augment: on a batch's features, in training only.
        decode: bytes -> array, for binary columns: one callable, or {column: callable}.
        collate: list of 1-d tensors -> tensor, for ragged columns: one callable, or {column: callable}.
        buffers: pattern of names (`"codebook.*"`) -> what becomes of the replicas' buffers, extra state and attributes of these names after
            a round: "mean" (or "ema"), "sum" of what was added, "max", "min", "first", "local" (of no meaning between rounds), or
            `f(tensors, weights) -> tensor`. torch's own modules have theirs.
        prediction: what `transform` writes: None (the output), "argmax", "probability" or a callable.
        prediction_col: its column.
        probability_col: for classifiers, a column of probabilities as a Spark ML vector; `prediction_col` then holds the
            class as a double, as Spark's evaluators expect.
        raw_prediction_col: as `probability_col`, of the scores before softmax.
        checkpoint_dir: a local path or URI; a fit that was killed goes on from its newest checkpoint.
        resume: "auto" goes on with a run that `checkpoint_dir` holds; False forgets it and starts over.
        keep_checkpoints: how many to keep.
        replay: a model's `history`: who counted in each round, how many steps each took and in which order pushes arrived is taken
            from it, so that a run with quorums, seconds or pushes gives its bits again.
        callbacks: called with each round's record; returning True ends the run, "checkpoint" has one written now. A
            `Callback`, such as `EMA(0.99)` or `SWA(start_round=30)`, hears of start and end too, and of the parameters.
        cpus_per_worker: CPUs of each replica's task, by a stage-level resource profile.
        gpus_per_worker: GPUs of each replica's task, in the same way.
        coordinator_host: the driver's name as executors reach it; default spark.driver.host.
        coordinator_port: a port, or a range (first, last), for the coordinator; default any free one.
        tls: True encrypts the coordinator's port, with a certificate of this fit that replicas pin (extra `tls`); "auto"
            where Spark encrypts its own connections; False never, with a warning there.
        encrypted_disks: True says that the system encrypts the executors' disks: where spark.io.encryption.enabled, a fit is
            refused without it, as Spark does not encrypt shards and replica states.
        deal: "rows" deals each row to a replica by a hash of it; "partitions" leaves the DataFrame's partitions, of which
            there must be `num_workers`, as they are, one to a replica.
        deal_key: a column of which equal values go to the same replica, such as a user or a label: shards that differ on
            purpose. Keys are dealt so that replicas have about as many rows; a job counts them first. Null is a key too.
        shard_dir: shared storage for shards, in place of the executors' local disks.
        transport: "socket": replicas dial the driver's port, many rounds a stage; "spark": every round is a Spark job, and no
            port is opened; "auto": "socket" on a classic session, "spark" on Spark Connect.
        exchange_dir: with "spark", a folder of storage that all executors share (the client need not reach it), for models
            that are too large to pass through the driver.
        worker_process: "auto" trains in a child process when on a GPU, so that no reused Python worker holds a CUDA context;
            "spawn" always, "reuse" never.
        progress: whether to show a progress bar.
        **settings: every field of `LocalSettings` and `RunSettings` (num_workers, batch_size, epochs, sync_every,
            inner_state, replica_state, rounds_per_stage, ...).

    Raises:
        ConfigError: a setting is unknown ("did you mean") or cannot be meant.
    """

    __module__ = "sparkdeep"  # what Spark ML writes into files, and imports when it reads them

    @keyword_only
    def __init__(
        self,
        *,
        model: nn.Module | Callable[..., Any] | str,
        optimizer: Callable[..., Any] | None = None,
        feature_cols: ColumnNames | None = None,
        label_cols: ColumnNames | None = None,
        loss: Callable[..., Tensor] | None = None,
        model_args: Mapping[str, Any] | None = None,
        lr_scheduler: Callable[..., Any] | None = None,
        learning_rate: float | None = None,
        algorithm: Algorithm | str | None = None,
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
        buffers: Mapping[str, Any] | None = None,
        prediction: Any = None,
        prediction_col: str = "prediction",
        probability_col: str | None = None,
        raw_prediction_col: str | None = None,
        checkpoint_dir: str | None = None,
        resume: str | bool = "auto",
        keep_checkpoints: int = 3,
        replay: Sequence[RoundRecord] = (),
        callbacks: Sequence[Callback | Callable[[RoundRecord], Any]] = (),
        cpus_per_worker: int | None = None,
        gpus_per_worker: int | None = None,
        coordinator_host: str | None = None,
        coordinator_port: int | tuple[int, int] | str | None = None,
        tls: bool | str = "auto",
        encrypted_disks: bool = False,
        deal: str = "rows",
        deal_key: str | None = None,
        shard_dir: str | None = None,
        transport: str = "auto",
        exchange_dir: str | None = None,
        worker_process: str = "auto",
        progress: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        self._search = False
        given = canonical(self._input_kwargs, ESTIMATOR_PARAMS, "TorchEstimator setting")
        self._setDefault(**_defaults())
        self._set(**given)
        self.settings()

    def settings(self) -> FitSettings:
        """The settings as one checked value.

        Raises:
            ConfigError: a value, or two together, cannot be meant.
        """
        values = values_of(self)
        if values["feature_cols"] is None:
            raise ConfigError('give feature_cols=, such as ["pixels"], or {argument of forward: column}.')
        preset = preset_of(values.pop("algorithm"))
        return FitSettings.of(values | {name: value for name, value in preset.items() if not self.isSet(name)})

    def fit(self, dataset: Any, params: Any = None, *, warm_start: TorchModel | None = None) -> Any:
        """Train on `dataset`.

        Args:
            dataset: the rows, as a DataFrame; only the used columns are read. Or what `sparkdeep.petastorm.open` gave, or
                petastorm's SparkDatasetConverter, whose row groups are then dealt to replicas whole.
            params: as for every Spark ML estimator: a param map, or a list of them for a list of models.
            warm_start: start from this model's parameters instead of fresh ones.

        Raises:
            ConfigError, DataError, PreflightError: before anything trains.
            UserCodeError, NonFiniteError, ReplicaLostError: see `sparkdeep.rounds.loop.run_rounds`.
        """
        if isinstance(params, Mapping):
            check_maps(self, [params])
        if warm_start is None:
            return super().fit(dataset, params)
        if isinstance(params, list | tuple):
            self._check(params)
            return [self.copy(one)._train(dataset, warm_start) for one in params]
        return (self.copy(params) if params else self)._train(dataset, warm_start)

    def fitMultiple(  # noqa: N802 (Spark ML's name)
        self,
        dataset: DataFrame,
        paramMaps: Sequence[Any],  # noqa: N803
    ) -> Iterator[tuple[int, TorchModel]]:
        """One model for each param map; every map is checked before the first model trains.

        Raises:
            ConfigError: a map names an unknown param, or sets a value that cannot be meant.
        """
        self._check(paramMaps)
        return super(TorchEstimator, self.copy({})).fitMultiple(dataset, paramMaps)

    def copy(self, extra: Mapping[Any, Any] | None = None) -> TorchEstimator:
        """A copy with the same uid and params.

        Args:
            extra: a param map for the copy. A copy with one, be it empty, is taken for one of several fits (that is how
                Pipeline, CrossValidator and TrainValidationSplit make theirs): it keeps its checkpoints in a folder of
                its own below `checkpoint_dir`, named by rows and settings.
        """
        that: TorchEstimator = super().copy(extra)
        that._search = self._search or extra is not None
        return that

    def write(self) -> EstimatorWriter:
        """A writer of this estimator's params, as every Spark ML stage has one: `estimator.write().overwrite().save(path)`.

        Functions and classes are stored by name, see `sparkdeep.spark.model.stored_values`; a module instance given as `model`, with
        its tensors.
        """
        return EstimatorWriter(self)

    @classmethod
    def read(cls) -> EstimatorReader:
        """A reader, used by `Pipeline.load` and `CrossValidator.load`; runs no stored code."""
        return EstimatorReader(cls)

    @classmethod
    def load(cls, path: str, *, allow_modules: Sequence[str] = ()) -> TorchEstimator:
        """Read an estimator that was saved; runs no stored code.

        Args:
            path: as given to `save`.
            allow_modules: modules whose functions and classes a stored name may mean, beside what is imported already
                (nn.Module classes) or registered.

        Raises:
            ModelLoadError: a name may not be resolved, or a file is damaged.
        """
        return EstimatorReader(cls, allow_modules).load(path)

    def _check(self, maps: Sequence[Any]) -> None:
        check_maps(self, maps)
        for one in maps:
            self.copy(one).settings()

    def _fit(self, dataset: Any) -> TorchModel:
        return self._train(dataset, None)

    def _train(self, dataset: Any, warm_start: TorchModel | None) -> TorchModel:
        model = train(replace(self.settings(), search=self._search), dataset, warm_start)
        return model._resetUid(self.uid)  # as every Spark ML model has its estimator's


def _defaults() -> dict[str, Any]:
    """Each param's default, from the one place where it is written."""
    found: dict[str, Any] = {"learning_rate": None, "algorithm": None}
    for settings in (LocalSettings, RunSettings, FitSettings):
        for one in fields(settings):
            value = one.default_factory() if one.default_factory is not MISSING else one.default
            if one.name in ESTIMATOR_PARAMS:
                found[one.name] = None if value is MISSING else value
    return found
