"""A model's files as Spark ML's writers and readers: the model folder, and beside it the metadata by which pipelines find it.

metadata/part-00000    Spark ML's: the class and the uid
metadata.json, model.safetensors, model.pkl: see `sparkdeep.models.saving`
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import cloudpickle
import pyspark
from pyspark.ml.util import MLReader, MLWriter
from pyspark.sql import SparkSession
from torch import nn

from sparkdeep.data.schema import Schema
from sparkdeep.errors import ConfigError, ModelLoadError
from sparkdeep.models.prediction import Prediction, check_scores
from sparkdeep.models.registry import ModelReference, reference_of
from sparkdeep.models.saving import read_model, read_reference, write_model
from sparkdeep.spark.model.stored_values import from_json, to_json
from sparkdeep.spark.session.hadoop import HadoopStore
from sparkdeep.storage.local import LocalStore
from sparkdeep.storage.opening import Store, open_store
from sparkdeep.tracking.records import RoundRecord

if TYPE_CHECKING:
    from sparkdeep.spark.model.model import TorchModel

__all__ = ["ModelReader", "ModelWriter", "relative_to_here", "write_file"]

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")
_STAGE: Final = "metadata"
_UNNAMED: Final[Mapping[str, Any]] = {"unnamed": True}
_CALLABLES: Final = ("preprocess", "collate", "decode")


@final
class ModelWriter(MLWriter):
    """Writes a model's folder.

    Args:
        model: what is written.
        pickle: also write the module itself with cloudpickle.
    """

    def __init__(self, model: TorchModel, *, pickle: bool = False) -> None:
        super().__init__()
        self._model = model
        self._pickle = pickle

    def save(self, path: str) -> None:
        """Save to `path`, a folder that is empty or not there, unless `overwrite()` was called.

        Overwriting replaces the files of a model and leaves others. A path without a scheme is what Spark takes it for.

        Raises:
            ConfigError: something lies there already, or a tensor cannot be stored.
        """
        model, store = self._model, _folder(path, self._sparkSession)
        if not self.shouldOverwrite and (held := store.list("")):
            raise ConfigError(
                f"{store.uri} holds {held[0]!r} already: save to another path, or replace it with "
                "model.write().overwrite().save(path)."
            )
        values = {param.name: value for param, value in model._paramMap.items()}
        written = model._written
        vectors = model._columns().vectors
        if written is not None and (written.choice, written.vectors) != (values.get("prediction"), vectors):
            written = None
        meta = {
            "uid": model.uid,
            "schema": model._schema.to_json(),
            "params": {name: _stored(value, name) for name, value in values.items()},
            "sql_type": None if written is None else written.sql_type,
            "scores": model._scores,
            "callables": {name: _stored(model._callables[name], name) for name in _CALLABLES},
            "history": [record.to_dict() for record in model.history],
        }
        pickled = bytes(cloudpickle.dumps(model.model)) if self._pickle else None
        write_model(store, model.model, reference=model._reference, meta=meta, pickled=pickled)
        store.delete(_STAGE)
        store.write(f"{_STAGE}/part-00000", _stage_metadata(model))


@final
class ModelReader(MLReader):
    """Reads a model's folder.

    Args:
        cls: the model's class.
        model: see `TorchModel.load`.
        allow_modules: see `TorchModel.load`.
        trust_pickle: see `TorchModel.load`.
    """

    def __init__(
        self,
        cls: type[TorchModel],
        *,
        model: nn.Module | Callable[..., Any] | None = None,
        allow_modules: Sequence[str] = (),
        trust_pickle: bool = False,
    ) -> None:
        super().__init__()
        self._cls = cls
        self._model = model
        self._allow_modules = allow_modules
        self._trust_pickle = trust_pickle

    def load(self, path: str, **given: Any) -> TorchModel:
        """Read the model in `path`.

        Args:
            path: as given to `save`.
            **given: preprocess, collate, decode and prediction, where they are not None: in place of the stored ones.

        Raises:
            ModelLoadError: a name that may not be resolved, a damaged file, a missing callable.
        """
        store = _folder_to_read(path, self._sparkSession)
        module, meta = read_model(
            store,
            model=self._model,
            allow_modules=self._allow_modules,
            trust_pickle=self._trust_pickle,
        )
        chosen = {name: value for name, value in given.items() if value is not None}
        try:
            schema = Schema.from_json(meta["schema"])
            stored = {name: meta["callables"][name] for name in _CALLABLES}
            params = dict(meta["params"])
            history = [RoundRecord.from_dict(record) for record in meta["history"]]
            uid, sql_type = str(meta["uid"]), meta["sql_type"]
            scores = check_scores(meta.get("scores"))  # the first version did not write it
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelLoadError(f"the metadata of {path} are damaged: {type(error).__name__}: {error}") from error
        prediction = chosen.pop("prediction", None)
        callables = self._found(path, stored, chosen)
        params = self._found(path, params, {} if prediction is None else {"prediction": prediction})
        try:
            model = self._cls(
                module=module, schema=schema, history=history, reference=self._reference(store), **callables, **params
            )
        except (ConfigError, TypeError) as error:
            raise ModelLoadError(f"the model in {path} cannot be made: {error}") from error
        model._scores = scores
        if isinstance(sql_type, str) and prediction is None:
            vectors = model._columns().vectors
            model._written = Prediction(
                choice=params.get("prediction"), sql_type=sql_type, vectors=vectors, scores=scores
            )
        model._resetUid(uid)
        if prediction is not None:
            model.set_prediction(prediction)
        return model

    def _reference(self, store: Store) -> ModelReference | None:
        """What a loaded model says of itself when it is saved again; nothing if it was loaded into something else."""
        stored = read_reference(store)
        if self._model is None or stored is None:
            return stored
        given = reference_of(self._model, stored.kwargs)
        return stored if given is not None and given.name == stored.name else None

    def _found(self, path: str, stored: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The stored values, those in `chosen` in place of theirs."""
        if unnamed := [name for name, value in stored.items() if value == _UNNAMED and name not in chosen]:
            raise ModelLoadError(
                f"the model in {path} was saved with {', '.join(unnamed)} that had no name to be stored under: pass "
                f"{', '.join(f'{name}=' for name in unnamed)} to TorchModel.load. For a pipeline, which passes nothing, "
                "define the function at the top of a module, call sparkdeep.register on it, and save again."
            )
        found = {}
        for name, value in stored.items():
            if name in chosen:
                found[name] = chosen[name]
                continue
            try:
                found[name] = from_json(value, name, allow_modules=self._allow_modules)
            except ModelLoadError as error:
                raise ModelLoadError(f"the model in {path}: {error}; or pass {name}= to TorchModel.load") from error
        return {**chosen, **found}


def relative_to_here(path: str) -> str:
    """A relative path as seen from this process's folder, even if Spark was started in another."""
    if _SCHEME.match(path) or not path or not isinstance(_folder(path, None), LocalStore):
        return path
    return str(Path(path).absolute())


def write_file(path: str, content: bytes, *, overwrite: bool) -> None:
    """Write one file by a path or URI.

    Raises:
        ConfigError: it is there already, or the path names no file.
    """
    folder, _, name = relative_to_here(path).rpartition("/")
    if not folder or not name or path.endswith("/"):
        raise ConfigError(f"{path!r} names no file: give the path of a file that is to be written.")
    store = _folder(folder, None)
    if overwrite:
        store.write(name, content)
    elif not store.create(name, content):
        raise ConfigError(f"{path!r} is there already: choose another path, or pass overwrite=True.")


def _stored(value: Any, name: str) -> Any:
    try:
        return to_json(value, name)
    except ConfigError:  # without a name: `load` says so, and is given it again
        return _UNNAMED


def _stage_metadata(model: TorchModel) -> bytes:
    """What Spark ML's readers look for; the settings are in our own metadata.json, as not all are JSON to Spark."""
    return json.dumps(
        {
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "timestamp": int(time.time() * 1000),
            "sparkVersion": pyspark.__version__,
            "uid": model.uid,
            "paramMap": {},
            "defaultParamMap": {},
        }
    ).encode()


def _folder(path: str, session: Any) -> Store:
    """The folder that Spark means by `path`: a scheme's, or one of its default file system."""

    def hadoop(uri: str) -> Store:
        spark = session or SparkSession.getActiveSession()
        if spark is None:
            raise ConfigError(f"{uri}: this scheme is read by Spark's Hadoop file system; start a Spark session first.")
        return HadoopStore(spark, uri)

    spark = session or SparkSession.getActiveSession()
    jvm = getattr(spark, "_jvm", None)
    if not path or _SCHEME.match(path) or jvm is None:  # without a JVM (Spark Connect) there is this machine only
        return open_store(path, fallback=hadoop)
    place = jvm.org.apache.hadoop.fs.Path(path)
    place = place.getFileSystem(spark._jsc.hadoopConfiguration()).makeQualified(place)
    return LocalStore(place.toUri().getPath()) if place.toUri().getScheme() == "file" else HadoopStore(spark, path)


def _folder_to_read(path: str, session: Any) -> Store:
    here = bool(path) and not _SCHEME.match(path) and Path(path).is_dir()
    return LocalStore(path) if here else _folder(path, session)
