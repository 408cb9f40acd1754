"""Values of settings that have names of their own: how a file names them, and what it may give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, Final

from sparkdeep.aggregators import Median, NormClip, RadialDirectional, TrimmedMean
from sparkdeep.algorithms import ALGORITHMS, Algorithm
from sparkdeep.asynchrony import Asynchronous
from sparkdeep.drift import FedProx, Scaffold
from sparkdeep.errors import ConfigError
from sparkdeep.local_work import QSR, AdaComm, DyLU, Epochs, PostLocal, WarmStart
from sparkdeep.setting_checks import refuse_unknown

__all__ = ["NAMED_SETTINGS", "VALUES", "named_value"]

NAMED_SETTINGS: Final = ("schedule", "aggregator", "drift_correction", "asynchronous", "algorithm")
"""Settings that take such values."""

VALUES: Final[Mapping[str, Any]] = MappingProxyType(
    {
        cls.__name__: cls
        for cls in (
            *(AdaComm, Asynchronous, DyLU, Epochs, FedProx, Median, NormClip, PostLocal, QSR, RadialDirectional),
            *(Scaffold, TrimmedMean, WarmStart),
        )
    }
)
"""Class by name; nothing but their fields makes them."""


def named_value(setting: str, given: Any) -> Any:
    """A value from a file: a table with a `name` and arguments, or the name alone.

    Args:
        setting: its name, for messages.
        given: such as {"name": "QSR", "alpha": 0.3}, "Median", or {"name": "diloco", "lr": 0.6} for `algorithm`.

    Raises:
        ConfigError: an unknown name or argument ("did you mean"), or one that cannot be meant.
    """
    table = {"name": given} if isinstance(given, str) else given
    if given == "mean" or not isinstance(table, Mapping):
        return given
    if not isinstance(table.get("name"), str):
        raise ConfigError(f'{setting}={given!r}: must have a name, such as {{ name = "QSR", alpha = 0.3 }}.')
    arguments = {key: _inner(setting, value) for key, value in table.items() if key != "name"}
    if setting == "algorithm":
        refuse_unknown([table["name"]], ALGORITHMS, "algorithm")
        try:
            preset: Algorithm = ALGORITHMS[table["name"]](**arguments)
        except TypeError as error:
            raise ConfigError(f"algorithm={given!r}: {error}.") from error
        return preset
    refuse_unknown([table["name"]], VALUES, setting)
    made = VALUES[table["name"]]
    refuse_unknown(arguments, [f.name for f in fields(made)], f"argument of {made.__name__}")
    try:
        return made(**arguments)
    except TypeError as error:
        raise ConfigError(f"{setting}={given!r}: {error}.") from error


def _inner(setting: str, value: Any) -> Any:
    return named_value(setting, value) if isinstance(value, Mapping) else value
