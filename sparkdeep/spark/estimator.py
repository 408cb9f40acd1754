"""The name of `TorchEstimator` in files of the first version."""

from sparkdeep.spark.fit.estimator import TorchEstimator

__all__ = ["TorchEstimator"]
