"""`TorchModel`: a trained network as a Spark ML model, batched, shipped once per executor, saved without pickle."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cloudpickle
from pyspark.ml.base import Model
from pyspark.ml.functions import array_to_vector
from pyspark.ml.param import Param
from pyspark.ml.util import MLReadable, MLWritable
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from torch import nn

from sparkdeep.data.schema import Callables, Schema
from sparkdeep.errors import ConfigError, DataError
from sparkdeep.models.export import exported
from sparkdeep.models.packing import pack_program
from sparkdeep.models.prediction import Prediction, check_choice
from sparkdeep.models.program import Program
from sparkdeep.models.registry import ModelReference
from sparkdeep.spark.model.columns import Columns, by_column, feature_cols_of
from sparkdeep.spark.model.files import ModelReader, ModelWriter, relative_to_here, write_file
from sparkdeep.spark.model.params import MODEL_PARAMS, canonical, values_of, with_params
from sparkdeep.spark.model.scoring import ZERO_ROWS, Scorer, prediction_udf, zero_batch, zero_output
from sparkdeep.spark.session.access import access_to
from sparkdeep.spark.session.parcels import carried
from sparkdeep.spark.session.types import column_types, selectable
from sparkdeep.tensors.parameters import content_mark, float_dtype_of, named_tensors
from sparkdeep.tensors.state_dicts import pack_tensors
from sparkdeep.tracking.callbacks import StartUp
from sparkdeep.tracking.records import RoundRecord

__all__ = ["TorchModel"]

_SCORED = "__sparkdeep_scored__"


@dataclass
class _Shipped:
    """The broadcast of one model in one session."""

    state: Any = None
    """What it was made from: the session, the module, its tensors' versions, and how it is run."""
    broadcast: Any = None


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What `transform` does, as the params say."""

    columns: Columns
    prediction: Prediction
    batch_size: int


@with_params(MODEL_PARAMS)
class TorchModel(Model, MLWritable, MLReadable):
    """A trained network; `transform` adds its prediction, and for classifiers what Spark ML's evaluators read.

    Its settings are Spark ML params, as the estimator's are: `model.batch_size` is the param, `getBatchSize()` its value,
    `setBatchSize(4096)` sets it, and `transform(df, {model.batch_size: 4096})` does for one call.

    Attributes:
        model: the trained nn.Module, on the CPU, in eval mode.
        history: one `RoundRecord` a round.
    """

    __module__ = "sparkdeep"  # what Spark ML writes into files, and imports when it reads them

    def __init__(
        self,
        *,
        module: nn.Module,
        schema: Schema,
        written: Prediction | None = None,
        history: Sequence[RoundRecord] = (),
        preprocess: Callable[[Any], Any] | None = None,
        collate: Callables = None,
        decode: Callables = None,
        reference: ModelReference | None = None,
        **params: Any,
    ) -> None:
        """Make a model of a trained module.

        Args:
            module: on the CPU.
            schema: the columns that it was trained on.
            written: the prediction that was tried with real rows; None: rows of zeros will do.
            history: of the fit.
            preprocess: the estimator's.
            collate: the estimator's.
            decode: the estimator's.
            reference: how the module can be built again.
            **params: values of `MODEL_PARAMS`.
        """
        super().__init__()
        self.model = module
        self.history = list(history)
        self.startup: StartUp | None = None
        """What the fit took before its first step; None for a model that was loaded, or whose fit had nothing left to do."""
        self._schema = schema
        self._written = written
        self._scores = None if written is None else written.scores
        self._callables: dict[str, Any] = {"preprocess": preprocess, "collate": collate, "decode": decode}
        self._reference = reference
        self._shipped = _Shipped()
        self._setDefault(
            feature_cols=feature_cols_of(schema),
            prediction=None,
            prediction_col="prediction",
            probability_col=None,
            raw_prediction_col=None,
            batch_size=1024,
        )
        self._set(**canonical(params, MODEL_PARAMS, "TorchModel setting"))

    def getModel(self) -> nn.Module:  # noqa: N802 (Spark ML's way of naming)
        """The trained network: the same as `model.model`."""
        return self.model

    def transform(self, dataset: DataFrame, params: Any = None) -> DataFrame:
        """Add the prediction column or columns; lazy, and fine on a streaming DataFrame.

        Args:
            dataset: rows with the feature columns.
            params: a param map for this call. Params of other stages in it are ignored, as everywhere in Spark ML.

        Raises:
            DataError: a feature column is missing or cannot become a tensor.
            ConfigError: a param cannot be meant, or a column to write is there already.
        """
        for key in params or {}:
            if not isinstance(key, Param):
                raise ConfigError(f"params has the key {key!r}; its keys are Params: {{model.batch_size: 4096}}.")
        return super().transform(dataset, params)

    def _transform(self, dataset: DataFrame) -> DataFrame:
        task = self._task()
        task.columns.refuse_taken(dataset.columns)
        columns = task.columns.features
        if missing := [name for name in columns if name not in dataset.columns]:
            raise DataError(f"the DataFrame lacks the feature column(s) {missing}; it has {dataset.columns}.")
        column_types(dataset.schema, columns)
        inputs = [selectable(name, dataset.schema[name].dataType) for name in columns]
        scored: Column = self._udf(dataset.sparkSession, task)(*inputs)
        outputs = task.columns.outputs
        if not task.prediction.vectors:
            return dataset.withColumn(outputs["prediction"], scored)
        # A column of its own first, so that the network runs once per row, however many of its parts are read.
        parts = {
            name: F.col(_SCORED)[part] if part == "prediction" else array_to_vector(F.col(_SCORED)[part])
            for part, name in outputs.items()
        }
        return dataset.withColumn(_SCORED, scored).withColumns(parts).drop(_SCORED)

    def udf(self) -> Any:
        """The prediction as a function for Spark SQL: `spark.udf.register("predict", model.udf())`.

        Its arguments are the feature columns in their order (of a mapping: argument by argument), decimals cast to
        double. It returns what `transform` writes; with `probability_col` or `raw_prediction_col` a struct of
        `prediction`, `probability` and `raw_prediction`, the latter two arrays. It keeps the model as it is now.

        Raises:
            ConfigError: no session is active, or a param cannot be meant.
        """
        spark = SparkSession.getActiveSession()
        if spark is None:
            raise ConfigError("no Spark session is active: start one before model.udf().")
        return self._udf(spark, self._task())

    def export(self, path: str, *, format: str = "torch", overwrite: bool = False) -> None:
        """Write the network, with `preprocess`, as one file that runs without sparkdeep.

        The file maps the tensors of a batch of any number of rows to the network's output; `decode`, `collate` and
        `prediction` are not part of it. What `collate` makes of ragged columns may be of any length.

        Args:
            path: of the file; a local path, or a URI as for `save`.
            format: "torch" for a torch.export program (`torch.export.load`), "onnx" for ONNX (the extra `onnx`).
            overwrite: replace a file that is there.

        Raises:
            ConfigError: the network or `preprocess` cannot be exported, with torch's reason; or the file is there.
        """
        program = self._program()
        batch = zero_batch(program, self._schema, float_dtype_of(self.model), ragged_length=4)
        ragged = frozenset(f.argument for f in self._schema.fields if f.role == "features" and f.ragged)
        write_file(path, exported(program, batch.features, format, ragged), overwrite=overwrite)

    # -- settings ------------------------------------------------------------------------------------------------

    def _log_to_mlflow(self, name: str, **options: Any) -> Any:
        """See `sparkdeep.tracking.log_model`, which calls it."""
        from sparkdeep.spark.model.pyfunc import logged

        return logged(self, name, **options)

    def set_prediction(self, prediction: Any, *, prediction_col: str | None = None) -> TorchModel:
        """Choose anew what `transform` writes, and where; checked at once; returns this model."""
        check_choice(prediction)
        self._set(prediction=prediction)
        if prediction_col is not None:
            self._set(prediction_col=prediction_col)
        self._task()
        return self

    def _task(self) -> _Task:
        """The params as one checked value.

        Raises:
            ConfigError: a value, or two together, cannot be meant.
        """
        values = values_of(self)
        size = values["batch_size"]
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"batch_size={size!r}: must be a whole number, at least 1.")
        columns = self._columns()
        return _Task(columns=columns, prediction=self._predicts(values["prediction"], columns.vectors), batch_size=size)

    def _columns(self) -> Columns:
        return Columns.of(self._schema, values_of(self))

    def _predicts(self, choice: Any, vectors: tuple[str, ...]) -> Prediction:
        written = self._written
        if written is None or (written.choice, written.vectors) != (choice, vectors):
            check_choice(choice, vectors)
            output = zero_output(self._program(), self._schema, float_dtype_of(self.model))
            self._written = written = Prediction.of(
                choice, output, rows=ZERO_ROWS, vectors=vectors, scores=self._scores
            )
        if not written.sql_type:
            raise ConfigError(
                "this model's output is no tensor with one row per input row: choose what transform writes with "
                "prediction=lambda output: ..., or model.set_prediction(...)."
            )
        return written

    def _udf(self, spark: SparkSession, task: _Task) -> Any:
        return prediction_udf(partial(Scorer.run, self._ship(spark, task)), task.prediction.sql_type)

    def _ship(self, spark: SparkSession, task: _Task) -> Any:
        """The model as a broadcast: made once per session, and again after a change; each executor fetches it once."""
        columns = task.columns
        program, tensors = pack_program(self._program(columns.renamed)), dict(named_tensors(self.model))
        state = (
            access_to(spark).session,
            # By content: an attribute, a write past torch's count of changes, a new preprocess make it another model.
            hashlib.blake2b(program, digest_size=16).digest(),
            content_mark(tensors.items()),
            columns.schema,
            task.prediction,
            task.batch_size,
        )
        if self._shipped.state != state:
            scorer = Scorer(
                uid=f"{self.uid}-{secrets.token_hex(8)}",
                program=program,
                tensors=pack_tensors(tensors),
                schema=columns.schema,
                prediction=cloudpickle.dumps(task.prediction),
                decode=cloudpickle.dumps(by_column(self._callables["decode"], columns.renamed)),
                columns=columns.features,
                batch_size=task.batch_size,
            )
            self._shipped = _Shipped(state=state, broadcast=carried(spark, scorer))
        return self._shipped.broadcast

    def _program(self, renamed: Mapping[str, str] | None = None) -> Program:
        return Program(
            model=self.model,
            loss=None,
            optimizer=_no_optimizer,
            preprocess=self._callables["preprocess"],
            collate=by_column(self._callables["collate"], renamed or {}),
        )

    # -- files ---------------------------------------------------------------------------------------------------

    def write(self) -> ModelWriter:
        """A writer, as every Spark ML model has one: `model.write().overwrite().save(path)`."""
        return ModelWriter(self)

    def save(self, path: str, *, pickle: bool = False) -> None:
        """Write the model into a new folder: weights as safetensors, the rest as JSON.

        `preprocess`, `collate`, `decode` and a callable `prediction` are stored by name where they have one that loading
        would accept (see `sparkdeep.register`); else `load` is given them again.

        Args:
            path: a local path, or any URI that pyarrow.fs or Spark's Hadoop file system takes.
            pickle: also write the module itself with cloudpickle, for `load(path, trust_pickle=True)`.

        Raises:
            ConfigError: something lies there already (`model.write().overwrite().save(path)` replaces it).
        """
        ModelWriter(self, pickle=pickle).save(relative_to_here(path))

    @classmethod
    def read(cls) -> ModelReader:
        """A reader, used by `PipelineModel.load` and `CrossValidatorModel.load`; runs no stored code."""
        return ModelReader(cls)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        model: nn.Module | Callable[..., Any] | None = None,
        allow_modules: Sequence[str] = (),
        trust_pickle: bool = False,
        preprocess: Callable[[Any], Any] | None = None,
        collate: Callables = None,
        decode: Callables = None,
        prediction: Any = None,
    ) -> TorchModel:
        """Read a model folder; runs no stored code.

        Args:
            path: as given to `save`.
            model: the class, callable or module to load the weights into; else the stored name is resolved.
            allow_modules: modules whose nn.Module classes and functions a stored name may mean, beside those classes that
                are imported already and what is registered.
            trust_pickle: unpickle a module that was saved with `pickle=True`. Only for files you trust: a pickle runs code.
            preprocess: the estimator's, where it had one that has no name.
            collate: as `preprocess`.
            decode: as `preprocess`.
            prediction: choose anew what `transform` writes.

        Raises:
            ModelLoadError: a name that may not be resolved, a damaged file, a missing callable.
        """
        reader = ModelReader(cls, model=model, allow_modules=allow_modules, trust_pickle=trust_pickle)
        return reader.load(path, preprocess=preprocess, collate=collate, decode=decode, prediction=prediction)


def _no_optimizer(*_: Any) -> Any:
    raise AssertionError("a model that only predicts has no optimizer")
