"""Runs told to what people watch them with: MLflow and TensorBoard, each an extra."""

from __future__ import annotations

from sparkdeep.tracking.mlflow import MLflowCallback, log_model
from sparkdeep.tracking.tensorboard import TensorBoardCallback

__all__ = ["MLflowCallback", "TensorBoardCallback", "log_model"]
