"""What a run tells, and to whom: records, callbacks, the bar, the report, MLflow and TensorBoard (each an extra).

Files: TODO
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparkdeep.tracking.mlflow import MLflowCallback, log_model
    from sparkdeep.tracking.tensorboard import TensorBoardCallback

__all__ = ["MLflowCallback", "TensorBoardCallback", "log_model"]

_LAZY = {
    "MLflowCallback": "sparkdeep.tracking.mlflow",
    "log_model": "sparkdeep.tracking.mlflow",
    "TensorBoardCallback": "sparkdeep.tracking.tensorboard",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sparkdeep.tracking' has no attribute {name!r}")
