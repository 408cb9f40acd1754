"""The module that pickles of Keras networks name."""

from sparkdeep.models.keras import _rebuilt

__all__ = ["_rebuilt"]
