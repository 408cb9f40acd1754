"""Train PyTorch networks on Apache Spark DataFrames: `TorchEstimator(...).fit(df)`, `model.transform(df)`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparkdeep.callbacks import Callback, FitInfo
from sparkdeep.config import EarlyStopping
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
    from sparkdeep.aggregators import Median, NormClip, RadialDirectional, TrimmedMean
    from sparkdeep.asynchrony import Asynchronous
    from sparkdeep.drift import FedProx, Scaffold
    from sparkdeep.local_work import QSR, AdaComm, DyLU, Epochs, PostLocal, WarmStart
    from sparkdeep.registry import register
    from sparkdeep.spark.doctor import doctor
    from sparkdeep.spark.estimator import TorchEstimator
    from sparkdeep.spark.model import TorchModel
    from sparkdeep.weight_averages import EMA, SWA, greedy_soup, soup

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

# pyspark is imported when these are first used, and not by a replica that only trains.
_LAZY = {
    "TorchEstimator": "sparkdeep.spark.estimator",
    "TorchModel": "sparkdeep.spark.model",
    "doctor": "sparkdeep.spark.doctor",
    "register": "sparkdeep.registry",
    **dict.fromkeys(("Median", "NormClip", "RadialDirectional", "TrimmedMean"), "sparkdeep.aggregators"),
    **dict.fromkeys(("AdaComm", "DyLU", "Epochs", "PostLocal", "QSR", "WarmStart"), "sparkdeep.local_work"),
    **dict.fromkeys(("FedProx", "Scaffold"), "sparkdeep.drift"),
    **dict.fromkeys(("EMA", "SWA", "greedy_soup", "soup"), "sparkdeep.weight_averages"),
    "Asynchronous": "sparkdeep.asynchrony",
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
