"""The module that MLflow models that the first version logged name."""

from sparkdeep.spark.model.pyfunc import _load_pyfunc

__all__ = ["_load_pyfunc"]
