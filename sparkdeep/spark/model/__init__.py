"""`TorchModel`: a trained network as a Spark ML model.

columns         which columns it reads and writes
files           its files, as Spark ML's writers and readers
model           the class
params          settings as Spark ML params
pyfunc          the model in MLflow
scoring         batched inference on executors
stored_values   settings as JSON, callables by name
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "TorchModel":  # files of the first version name sparkdeep.spark.model.TorchModel
        from sparkdeep.spark.model.model import TorchModel

        return TorchModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
