"""What a run tells: records, callbacks, bar, report, MLflow, TensorBoard.

- `callbacks.py`: what a fit tells those who watch it, and what it costs before its first step
- `charts.py`: charts as data for a template
- `mlflow.py`: runs in MLflow
- `outbox.py`: items for a server that may be down
- `progress.py`: the progress bar
- `records.py`: the record of a round
- `report.html.jinja`: the report's page
- `report.py`: a run as one HTML page
- `tensorboard.py`: event files for TensorBoard
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
