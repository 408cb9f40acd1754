"""A trained network as a Spark ML model: columns in, predictions out; saved, loaded, exported.

- `columns.py`: which columns a model reads and writes
- `files.py`: a model as Spark ML's writers and readers
- `model.py`: `TorchModel`
- `params.py`: settings as Spark ML params
- `pyfunc.py`: a model as MLflow's pyfunc
- `scoring.py`: batched inference on executors
- `stored_values.py`: settings as JSON, callables by name
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "TorchModel":  # files of the first version name sparkdeep.spark.model.TorchModel
        return import_module("sparkdeep.spark.model.model").TorchModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
