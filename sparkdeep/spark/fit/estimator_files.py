"""An estimator's files: Spark ML's metadata with every setting as JSON, and the tensors of a module given as `model`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, final

import pyspark
from pyspark.ml.util import DefaultParamsReader, DefaultParamsWriter, MLReader, MLWriter
from torch import nn

from sparkdeep.errors import ConfigError, ModelLoadError
from sparkdeep.models.registry import import_factory, reference_of
from sparkdeep.models.saving import read_model, write_model
from sparkdeep.spark.model.stored_values import from_json, to_json
from sparkdeep.spark.session.access import is_connect
from sparkdeep.spark.session.hadoop import HadoopStore

if TYPE_CHECKING:
    from sparkdeep.spark.fit.estimator import TorchEstimator

__all__ = ["EstimatorReader", "EstimatorWriter"]

_FORMAT_VERSION: Final = 1
_MODULE: Final = "module"


@final
class EstimatorWriter(MLWriter):
    """Writes what was set; defaults stay those of the version that reads.

    Raises:
        ConfigError: a param cannot be stored; the message names it, with what to do. Nothing was written.
    """

    def __init__(self, estimator: TorchEstimator) -> None:
        super().__init__()
        self._estimator = estimator

    def save(self, path: str) -> None:
        """Save to `path`, which must not exist without `overwrite()`."""
        self._encoded()  # what cannot be stored is refused before `overwrite` removes what lies there
        super().save(path)

    def _handleOverwrite(self, path: str) -> None:  # noqa: N802 (Spark ML's name)
        if not is_connect(self.sparkSession):
            super()._handleOverwrite(path)
            return
        # Spark ML's way needs a JVM here; the server clears the folder when an empty table is written over it.
        self.sparkSession.createDataFrame([], "value string").write.mode("overwrite").text(path)

    def saveImpl(self, path: str) -> None:  # noqa: N802 (Spark ML's name)
        """Write the folder."""
        params, module = self._encoded()
        DefaultParamsWriter.saveMetadata(
            self._estimator,
            path,
            _session(self),
            extraMetadata={"sparkdeep": {"format_version": _FORMAT_VERSION}},
            paramMap=params,
        )
        if module is not None:
            reference = reference_of(module, None)
            write_model(HadoopStore(self.sparkSession, _join(path)), module, reference=reference, meta={})

    def _encoded(self) -> tuple[dict[str, Any], nn.Module | None]:
        values = {param.name: value for param, value in self._estimator._paramMap.items()}
        model = values.get("model")
        if isinstance(model, nn.Module):
            if reference_of(model, None) is None:
                raise ConfigError(
                    f"model is a {type(model).__name__} that cannot be stored: only an instance whose class, called without "
                    "arguments, builds the same layers can. Give the class or a registered function as model=, and its "
                    "arguments as model_args=."
                )
            del values["model"]
        elif isinstance(model, str):
            values["model"] = import_factory(model)  # by the same rules as the object it names
        return {name: to_json(value, name) for name, value in values.items()}, model if isinstance(
            model, nn.Module
        ) else None


@final
class EstimatorReader(MLReader):
    """Reads what `EstimatorWriter` wrote.

    Args:
        cls: the estimator's class.
        allow_modules: see `TorchEstimator.load`.
    """

    def __init__(self, cls: Callable[..., TorchEstimator], allow_modules: Sequence[str] = ()) -> None:
        super().__init__()
        self._cls = cls
        self._allow_modules = allow_modules

    def load(self, path: str) -> TorchEstimator:
        """Read the estimator in `path`.

        Raises:
            ModelLoadError: it is no estimator, of a later version, or damaged, or names what may not be resolved.
        """
        metadata = DefaultParamsReader.loadMetadata(path, _session(self))
        version = (metadata.get("sparkdeep") or {}).get("format_version")
        if version != _FORMAT_VERSION:
            raise ModelLoadError(
                f"{path} holds {metadata.get('class')} in format {version}; this version reads estimators in format "
                f"{_FORMAT_VERSION}."
            )
        params = {
            name: from_json(value, name, allow_modules=self._allow_modules)
            for name, value in metadata["paramMap"].items()
        }
        if "model" not in params:
            store = HadoopStore(self.sparkSession, _join(path))
            params["model"], _ = read_model(store, allow_modules=self._allow_modules)
            params["model"].train()
        try:
            estimator = self._cls(**params)
        except (ConfigError, TypeError) as error:
            raise ModelLoadError(f"the estimator in {path} cannot be made: {error}") from error
        estimator._resetUid(metadata["uid"])
        return estimator


def _session(files: MLReader | MLWriter) -> Any:
    # Spark 3.5 takes the context here, Spark 4 the session, the only one that Connect has.
    return files.sc if pyspark.__version__.startswith("3.") else files.sparkSession


def _join(path: str) -> str:
    return os.path.join(path, _MODULE)  # noqa: PTH118 (a path or a URI, as in Spark ML)
