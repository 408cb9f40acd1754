"""The module that pickles of Keras networks name which the first version wrote."""

from sparkdeep.models.keras import _rebuilt

__all__ = ["_rebuilt"]
