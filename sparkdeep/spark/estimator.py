"""The module that stages that the first version saved name."""

from sparkdeep.spark.fit.estimator import TorchEstimator

__all__ = ["TorchEstimator"]
