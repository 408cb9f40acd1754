"""`TorchModel`: a trained network as a Spark transformer, batched, shipped once per executor, saved without pickle."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import cloudpickle
from pyspark.ml.base import Model
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from torch import nn

from sparkdeep.data.schema import Callables, Schema
from sparkdeep.errors import ConfigError, DataError, ModelLoadError
from sparkdeep.metrics import RoundRecord
from sparkdeep.parameters import float_dtype_of, named_tensors
from sparkdeep.prediction import Prediction, check_choice
from sparkdeep.program import Program, pack_program
from sparkdeep.registry import ModelReference
from sparkdeep.saving import read_model, write_model
from sparkdeep.spark.hadoop import HadoopStore
from sparkdeep.spark.scoring import ZERO_ROWS, Scorer, predict_column, zero_output
from sparkdeep.spark.types import column_types, quoted
from sparkdeep.store import Store, open_store
from sparkdeep.trees import pack_tensors

__all__ = ["TorchModel"]

_CALLABLES = ("preprocess", "collate", "decode")


@dataclass
class _Shipped:
    """The broadcast of one model in one session."""

    state: Any = None
    """What it was made from: the session, the module, its tensors' versions, and how it is run."""
    broadcast: Any = None


@dataclass
class _Settings:
    schema: Schema
    prediction: Prediction
    prediction_col: str
    callables: dict[str, Any] = field(default_factory=dict)


class TorchModel(Model):
    """A trained network; `transform` adds its prediction column.

    Attributes:
        model: the trained nn.Module, on the CPU, in eval mode.
        history: one `RoundRecord` a round.
        batch_size: rows per forward pass in `transform`.
    """

    def __init__(
        self,
        *,
        module: nn.Module,
        schema: Schema,
        prediction: Prediction,
        prediction_col: str = "prediction",
        history: Sequence[RoundRecord] = (),
        batch_size: int = 1024,
        preprocess: Callable[[Any], Any] | None = None,
        collate: Callables = None,
        decode: Callables = None,
        reference: ModelReference | None = None,
    ) -> None:
        super().__init__()
        self.model = module
        self.history = list(history)
        self.batch_size = batch_size
        self._settings = _Settings(
            schema=schema,
            prediction=prediction,
            prediction_col=prediction_col,
            callables={"preprocess": preprocess, "collate": collate, "decode": decode},
        )
        self._reference = reference
        self._shipped = _Shipped()

    @property
    def prediction_col(self) -> str:
        """Name of the column that `transform` adds."""
        return self._settings.prediction_col

    def _transform(self, dataset: DataFrame) -> DataFrame:
        """Add the prediction column; lazy, and fine on a streaming DataFrame.

        Raises:
            DataError: a feature column is missing or cannot become a tensor.
            ConfigError: the prediction column is there already.
        """
        taken = [name for name in dataset.columns if name.casefold() == self.prediction_col.casefold()]
        if taken:  # Spark resolves names without regard to case: withColumn would replace it silently
            raise ConfigError(
                f"column {taken[0]!r} is in the DataFrame already; drop or rename it, or choose another prediction_col."
            )
        if not self._settings.prediction.sql_type:
            raise ConfigError(
                "this model's output is no tensor with one row per input row: choose what transform writes with "
                "prediction=lambda output: ..., or model.set_prediction(...)."
            )
        columns = self._feature_columns()
        missing = [name for name in columns if name not in dataset.columns]
        if missing:
            raise DataError(f"the DataFrame lacks the feature column(s) {missing}; it has {dataset.columns}.")
        column_types(dataset.schema, columns)
        return dataset.withColumn(self.prediction_col, self._predicted(dataset, columns))

    def _predicted(self, dataset: DataFrame, columns: Sequence[str]) -> Column:
        decimals = {f.name for f in dataset.schema.fields if f.dataType.typeName() == "decimal"}
        inputs = [F.col(quoted(c)).cast("double") if c in decimals else F.col(quoted(c)) for c in columns]
        return predict_column(
            partial(Scorer.run, self._ship(dataset.sparkSession)), inputs, self._settings.prediction.sql_type
        )

    def _feature_columns(self) -> list[str]:
        features = [f for f in self._settings.schema.fields if f.role == "features"]
        return list(dict.fromkeys(column for f in features for column in f.columns))

    def _ship(self, spark: SparkSession) -> Any:
        """The model as a broadcast: once a session, fetched once by each executor, and again when it was changed."""
        context = spark.sparkContext
        tensors = [(id(t), 0 if t.is_inference() else t._version) for _, t in named_tensors(self.model)]
        state = (context, id(self.model), tensors, self.batch_size)
        if self._shipped.state != state:
            scorer = Scorer(
                uid=f"{self.uid}-{secrets.token_hex(8)}",
                program=pack_program(self._program()),
                tensors=pack_tensors(dict(named_tensors(self.model))),
                schema=self._settings.schema,
                prediction=cloudpickle.dumps(self._settings.prediction),
                decode=cloudpickle.dumps(self._settings.callables["decode"]),
                columns=tuple(self._feature_columns()),
                batch_size=self.batch_size,
            )
            self._shipped = _Shipped(state=state, broadcast=context.broadcast(scorer))
        return self._shipped.broadcast

    def _program(self) -> Program:
        return Program(
            model=self.model,
            loss=None,
            optimizer=_no_optimizer,
            preprocess=self._settings.callables["preprocess"],
            collate=self._settings.callables["collate"],
        )

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str, *, pickle: bool = False) -> None:
        """Write the model into a folder: weights as safetensors, the rest as JSON.

        Callables (preprocess, collate, decode, prediction) are not written; `load` is given them again.

        Args:
            path: a local path, or any URI that pyarrow.fs or Spark's Hadoop file system takes.
            pickle: also write the module itself with cloudpickle, for `load(path, trust_pickle=True)`.
        """
        settings = self._settings
        choice = settings.prediction.choice
        meta: dict[str, Any] = {
            "schema": settings.schema.to_json(),
            "prediction": {
                "choice": choice if isinstance(choice, str) or choice is None else "callable",
                "sql_type": settings.prediction.sql_type,
                "column": settings.prediction_col,
            },
            "callables": [name for name in _CALLABLES if settings.callables[name] is not None],
            "batch_size": self.batch_size,
            "history": [record.to_dict() for record in self.history],
        }
        pickled = bytes(cloudpickle.dumps(self.model)) if pickle else None
        write_model(_store(path), self.model, reference=self._reference, meta=meta, pickled=pickled)

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
            allow_modules: modules whose nn.Module classes a stored name may mean, beside those imported already.
            trust_pickle: unpickle a module that was saved with `pickle=True`. Only for files you trust: a pickle runs code.
            preprocess: the estimator's, where it had one.
            collate: as `preprocess`.
            decode: as `preprocess`.
            prediction: choose anew what `transform` writes.

        Raises:
            ModelLoadError: a name that may not be resolved, a damaged file, a missing callable.
        """
        module, meta = read_model(_store(path), model=model, allow_modules=allow_modules, trust_pickle=trust_pickle)
        given = {"preprocess": preprocess, "collate": collate, "decode": decode}
        try:
            schema = Schema.from_json(meta["schema"])
            stored: Mapping[str, Any] = meta["prediction"]
            needed = [str(name) for name in meta["callables"] if given.get(str(name)) is None]
            history = [RoundRecord.from_dict(record) for record in meta["history"]]
            choice, sql_type = stored["choice"], str(stored["sql_type"])
            column, batch_size = str(stored["column"]), int(meta["batch_size"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelLoadError(f"the metadata of {path} are damaged: {type(error).__name__}: {error}") from error
        if needed:
            raise ModelLoadError(
                f"the model in {path} was trained with {', '.join(needed)}, and callables are not stored: pass "
                f"{', '.join(f'{name}=' for name in needed)} to TorchModel.load."
            )
        check_choice(prediction)
        if prediction is None and choice == "callable":
            raise ModelLoadError(
                f"the model in {path} wrote a callable's prediction, which is not stored: pass prediction=."
            )
        result = cls(
            module=module.eval(),
            schema=schema,
            prediction=Prediction(choice=choice if prediction is None else prediction, sql_type=sql_type),
            prediction_col=column,
            history=history,
            batch_size=batch_size,
            preprocess=preprocess,
            collate=collate,
            decode=decode,
        )
        if prediction is not None:
            result.set_prediction(prediction)
        return result

    def set_prediction(self, prediction: Any, *, prediction_col: str | None = None) -> TorchModel:
        """Choose anew what `transform` writes, and where; returns this model."""
        check_choice(prediction)
        output = zero_output(self._program(), self._settings.schema, float_dtype_of(self.model))
        self._settings.prediction = Prediction.of(prediction, output, rows=ZERO_ROWS)
        if prediction_col is not None:
            self._settings.prediction_col = prediction_col
        self._shipped = _Shipped()
        return self


def _no_optimizer(*_: Any) -> Any:
    raise AssertionError("a model that only predicts has no optimizer")


def _store(path: str) -> Store:
    def hadoop(uri: str) -> Store:
        session = SparkSession.getActiveSession()
        if session is None:
            raise ConfigError(f"{uri}: this scheme is read by Spark's Hadoop file system; start a Spark session first.")
        return HadoopStore(session, uri)

    return open_store(path, fallback=hadoop)
