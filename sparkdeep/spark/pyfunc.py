"""The loader that MLflow models of the first version name."""

from sparkdeep.spark.model.pyfunc import _load_pyfunc

__all__ = ["_load_pyfunc"]
