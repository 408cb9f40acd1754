"""The module that every logged MLflow model names as its loader: it stays here, wherever the loader itself lies."""

from sparkdeep.spark.model.pyfunc import _load_pyfunc

__all__ = ["_load_pyfunc"]
