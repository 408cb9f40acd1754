"""Rules that a setting's value must keep; each error gives the value, the rule and what to give instead."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

from sparkdeep.errors import ConfigError

__all__ = ["at_least", "instance", "not_negative", "one_of", "positive", "refuse_unknown"]


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse the first unknown name, with the nearest known one.

    Raises:
        ConfigError: with "did you mean".
    """
    names = sorted(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown {where} {name!r}.{hint} Known: {', '.join(names)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def at_least(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r}: must be a whole number of at least {least}.")


def positive(name: str, value: Any) -> None:
    """Refuse what is no positive number."""
    if not _is_number(value) or not value > 0:
        raise ConfigError(f"{name}={value!r}: must be a positive number.")


def not_negative(name: str, value: Any, below: float = math.inf) -> None:
    """Refuse what is no number from 0 to below `below`."""
    if not _is_number(value) or not 0 <= value < below:
        limit = f"from 0 to below {below:g}" if below < math.inf else "that is not negative"
        raise ConfigError(f"{name}={value!r}: must be a number {limit}.")


def one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse what is none of `choices`."""
    if value not in (listed := list(choices)):
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(map(repr, listed))}.")


def instance(name: str, value: Any, kinds: tuple[type, ...], what: str) -> None:
    """Refuse what is neither None nor of `kinds`."""
    if value is not None and not isinstance(value, kinds):
        raise ConfigError(f"{name}={value!r}: must be {what}, or None.")
