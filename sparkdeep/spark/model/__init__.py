"""TODO: one sentence, and the files below."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "TorchModel":  # files of the first version name sparkdeep.spark.model.TorchModel
        from sparkdeep.spark.model.model import TorchModel

        return TorchModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
