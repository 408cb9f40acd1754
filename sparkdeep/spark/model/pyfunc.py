"""A model as MLflow's pyfunc: logged with its signature, and scored from pandas without a Spark session."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import cloudpickle
import pyarrow as pa

from sparkdeep.data.schema import Field, callable_for
from sparkdeep.errors import ConfigError, DataError, ModelLoadError
from sparkdeep.models.packing import pack_program
from sparkdeep.spark.model.columns import by_column
from sparkdeep.spark.model.model import TorchModel
from sparkdeep.spark.model.scoring import Scorer, load_here
from sparkdeep.spark.model.stored_values import to_json
from sparkdeep.tensors.parameters import named_tensors
from sparkdeep.tensors.state_dicts import pack_tensors
from sparkdeep.tracking.mlflow import mlflow_module

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PyfuncModel", "logged"]

_FACTS: Final = "pyfunc.json"
_MODEL: Final = "model"
_LOADER: Final = "sparkdeep.pyfunc"
"""The module that logged models name; it gives them `_load_pyfunc`."""
_PACKAGES: Final = ("sparkdeep", "torch", "pyspark", "pyarrow", "numpy", "pandas", "safetensors", "cloudpickle")


@final
class PyfuncModel:
    """What `mlflow.pyfunc.load_model` holds: feature columns in, predictions out."""

    def __init__(self, model: TorchModel) -> None:
        task = model._task()
        columns = task.columns
        scorer = Scorer(
            uid=f"{model.uid}-{secrets.token_hex(8)}",
            program=pack_program(model._program(columns.renamed)),
            tensors=pack_tensors(dict(named_tensors(model.model))),
            schema=columns.schema,
            prediction=cloudpickle.dumps(task.prediction),
            decode=cloudpickle.dumps(by_column(model._callables["decode"], columns.renamed)),
            columns=columns.features,
            batch_size=task.batch_size,
        )
        self._features = list(columns.features)
        self._outputs = columns.outputs
        self._loaded = load_here(scorer)

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Score rows.

        Args:
            model_input: the feature columns, among others; arrays as lists or numpy arrays.
            params: MLflow passes them; there are none.

        Returns:
            One row per row of `model_input`, with its index.

        Raises:
            DataError: a feature column is missing or cannot become a tensor.
        """
        import pandas as pd

        del params
        if missing := [name for name in self._features if name not in model_input.columns]:
            raise DataError(f"the rows lack the feature column(s) {missing}; they have {list(model_input.columns)}.")
        scored = self._loaded.predict([pa.array(_cells(model_input[name])) for name in self._features])
        several = pa.types.is_struct(scored.type)
        parts = {part: scored.field(part) for part in self._outputs} if several else {"prediction": scored}
        return pd.DataFrame(
            {self._outputs[part]: array.to_pandas().to_numpy() for part, array in parts.items()},
            index=model_input.index,
        )


def _cells(series: Any) -> Any:
    """A column for pyarrow, which takes arrays of one dimension in cells, and lists of any."""
    if series.dtype != object:
        return series.to_numpy()
    return [cell.tolist() if hasattr(cell, "tolist") else cell for cell in series]


def _load_pyfunc(data_path: str) -> PyfuncModel:
    """Called by `mlflow.pyfunc.load_model`, by this name."""
    folder = Path(data_path)
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        allowed, trusted = [str(name) for name in facts["allow_modules"]], bool(facts["pickle"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{data_path} is no pyfunc of sparkdeep ({error}): log the model again") from error
    return PyfuncModel(TorchModel.load(_uri(folder / _MODEL), allow_modules=allowed, trust_pickle=trusted))


def logged(
    model: TorchModel,
    name: str,
    *,
    run_id: str | None,
    registered_model_name: str | None,
    code_paths: list[str],
    pickle: bool,
) -> Any:
    """See `sparkdeep.tracking.log_model`."""
    log = mlflow_module("models").Model.log
    modules = _modules_of(model, pickle=pickle)
    with tempfile.TemporaryDirectory(prefix="sparkdeep-") as home:
        data = Path(home) / "data"
        data.mkdir()
        model.save(_uri(data / _MODEL), pickle=pickle)
        (data / _FACTS).write_text(json.dumps({"allow_modules": modules, "pickle": pickle}), encoding="utf-8")
        _load_pyfunc(str(data))  # what cannot be loaded should fail now, while the model is at hand
        # MLflow 3 calls it name; before it was artifact_path.
        place = {"name": name} if "name" in inspect.signature(log).parameters else {}
        return log(
            artifact_path=None if place else name,
            flavor=mlflow_module("pyfunc"),
            run_id=run_id,
            registered_model_name=registered_model_name,
            loader_module=_LOADER,
            data_path=str(data),
            code_paths=code_paths or None,
            signature=_signature(model),
            pip_requirements=[f"{one}=={importlib.metadata.version(one).partition('+')[0]}" for one in _PACKAGES],
            **place,
        )


def _uri(path: Path) -> str:
    """A local path stays local when the cluster's default file system is another."""
    return path.absolute().as_uri()


def _modules_of(model: TorchModel, *, pickle: bool) -> list[str]:
    """The modules that loading must import.

    Raises:
        ConfigError: the network or a callable has no name by which another process could find it.
    """
    names = []
    if not pickle:
        reference = model._reference
        names = [type(model.model).__qualname__ if reference is None else reference.name]
    given = {**model._callables, "prediction": model._task().prediction.choice}
    names += [found for name, value in given.items() for found in _names_in(to_json(value, name))]
    for name in names:
        if ":" not in name or name.startswith("__main__:"):
            raise ConfigError(
                f"the model needs {name!r}, by which another process cannot find anything: define it at the top of a module "
                "that can be imported there, such as a file given by code_paths. For the network itself pickle=True will "
                "do, too."
            )
    return sorted({name.partition(":")[0] for name in names})


def _names_in(stored: Any) -> list[str]:
    """The names in what `to_json` gave."""
    if isinstance(stored, list):
        return [name for one in stored for name in _names_in(one)]
    if not isinstance(stored, dict):
        return []
    own = [stored[key] for key in ("name", "partial", "module") if isinstance(stored.get(key), str)]
    return own + [name for value in stored.values() if isinstance(value, list | dict) for name in _names_in(value)]


# -- signature --------------------------------------------------------------------------------------------------------


def _signature(model: TorchModel) -> Any:
    """Columns and types, in and out."""
    types = mlflow_module("types")
    columns = model._task().columns
    decode = by_column(model._callables["decode"], columns.renamed)
    taken: dict[str, Any] = {}
    for field in columns.schema.fields:
        if field.role == "features":
            for column in field.columns:
                taken.setdefault(column, _input_type(field, decoded=callable_for(column, decode) is not None))
    given = _output_types(model._task().prediction.sql_type)
    return mlflow_module("models").ModelSignature(
        inputs=types.Schema([types.ColSpec(kind, name) for name, kind in taken.items()]),
        outputs=types.Schema([types.ColSpec(kind, columns.outputs[part]) for part, kind in given.items()]),
    )


def _input_type(field: Field, *, decoded: bool) -> Any:
    """The type of one column of a field: a number, or an array; of numbers laid side by side each column is one."""
    kinds = mlflow_module("types").DataType
    if decoded and len(field.columns) == 1 and not field.ragged:
        return kinds.binary
    element = {"int64": kinds.long, "bool": kinds.boolean}.get(field.dtype, kinds.double)
    shape: Sequence[int] = field.shape or ()
    if field.ragged:
        return _nested(element, 1)
    if not field.stacked or (len(field.columns) == 1 and len(shape) == 1 and shape[0] > 1):
        return _nested(element, len(shape))
    if tuple(shape) == (len(field.columns),):
        return element
    return mlflow_module(
        "types.schema"
    ).AnyType()  # numbers and arrays laid side by side: the schema does not say which is which


def _output_types(sql_type: str) -> dict[str, Any]:
    if sql_type.startswith("struct<"):
        parts = sql_type.removeprefix("struct<").removesuffix(">").split(",")
        pairs = [part.strip().replace(":", " ", 1).split(None, 1) for part in parts]
        return {name: _output_type(kind) for name, kind in pairs}
    return {"prediction": _output_type(sql_type)}


def _output_type(sql: str) -> Any:
    kinds = mlflow_module("types").DataType
    depth = sql.count("array<")
    scalar = sql.replace("array<", "").replace(">", "").strip()
    names = {"bigint": kinds.long, "boolean": kinds.boolean, "float": kinds.float, "double": kinds.double}
    return _nested(names[scalar], depth)


def _nested(element: Any, depth: int) -> Any:
    for _ in range(depth):
        element = mlflow_module("types.schema").Array(element)
    return element
