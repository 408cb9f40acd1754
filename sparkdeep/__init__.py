"""Train PyTorch networks on Apache Spark DataFrames: `TorchEstimator(...).fit(df)`, `model.transform(df)`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparkdeep.errors import (
    CheckpointError,
    ConfigError,
    CoordinatorUnreachableError,
    DataError,
    ModelLoadError,
    NonFiniteError,
    PreflightError,
    ReplicaLostError,
    ShardMismatchError,
    SparkdeepError,
    UserCodeError,
    VersionMismatchError,
)

if TYPE_CHECKING:
    from sparkdeep import algorithms, petastorm, tracking
    from sparkdeep.models.registry import register
    from sparkdeep.optim.aggregators import Median, NormClip, RadialDirectional, TrimmedMean
    from sparkdeep.optim.asynchronous import Asynchronous
    from sparkdeep.optim.drift import FedProx, Scaffold
    from sparkdeep.optim.local_work import QSR, AdaComm, DyLU, Epochs, PostLocal, WarmStart
    from sparkdeep.optim.model_averages import EMA, SWA, greedy_soup, soup
    from sparkdeep.settings.run import EarlyStopping
    from sparkdeep.spark.doctor.doctor import doctor
    from sparkdeep.spark.fit.estimator import TorchEstimator
    from sparkdeep.spark.model.model import TorchModel
    from sparkdeep.tracking.callbacks import Callback, FitInfo

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "QSR",
    "SWA",
    "AdaComm",
    "Asynchronous",
    "Callback",
    "CheckpointError",
    "ConfigError",
    "CoordinatorUnreachableError",
    "DataError",
    "DyLU",
    "EarlyStopping",
    "Epochs",
    "FedProx",
    "FitInfo",
    "Median",
    "ModelLoadError",
    "NonFiniteError",
    "NormClip",
    "PostLocal",
    "PreflightError",
    "RadialDirectional",
    "ReplicaLostError",
    "Scaffold",
    "ShardMismatchError",
    "SparkdeepError",
    "TorchEstimator",
    "TorchModel",
    "TrimmedMean",
    "UserCodeError",
    "VersionMismatchError",
    "WarmStart",
    "algorithms",
    "doctor",
    "greedy_soup",
    "petastorm",
    "register",
    "soup",
    "tracking",
]

# Imported when they are first used: a replica that only trains never imports pyspark, and numpy's threads, which the first
# import of it starts, are for `spark.daemon` to hold back.
_LAZY = {
    "TorchEstimator": "sparkdeep.spark.fit.estimator",
    "TorchModel": "sparkdeep.spark.model.model",
    "doctor": "sparkdeep.spark.doctor.doctor",
    "register": "sparkdeep.models.registry",
    **dict.fromkeys(("Median", "NormClip", "RadialDirectional", "TrimmedMean"), "sparkdeep.optim.aggregators"),
    **dict.fromkeys(("AdaComm", "DyLU", "Epochs", "PostLocal", "QSR", "WarmStart"), "sparkdeep.optim.local_work"),
    **dict.fromkeys(("FedProx", "Scaffold"), "sparkdeep.optim.drift"),
    **dict.fromkeys(("EMA", "SWA", "greedy_soup", "soup"), "sparkdeep.optim.model_averages"),
    "Asynchronous": "sparkdeep.optim.asynchronous",
    "Callback": "sparkdeep.tracking.callbacks",
    "EarlyStopping": "sparkdeep.settings.run",
    "FitInfo": "sparkdeep.tracking.callbacks",
}
_LAZY_MODULES = ("algorithms", "petastorm", "tracking")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return import_module(f"sparkdeep.{name}")
    raise AttributeError(f"module 'sparkdeep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_LAZY_MODULES])
