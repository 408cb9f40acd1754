"""Rules that a setting's value must keep; each error gives the value, the rule and what to give instead."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from sparkdeep.errors import ConfigError

__all__ = [
    "at_least",
    "changed",
    "fits",
    "hint",
    "instance",
    "known",
    "misfit",
    "not_negative",
    "one_of",
    "positive",
    "refuse_unknown",
    "shown",
    "spelled",
]


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse the first unknown name, with the nearest known one.

    Raises:
        ConfigError: with "did you mean".
    """
    names = sorted(known)
    for name in given:
        if name not in names:
            raise ConfigError(f"unknown {where} {name!r}.{hint(name, names)} Known: {', '.join(names)}.")


def hint(given: object, names: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """Ask "Did you mean ...?" with the nearest of the names, after a space; "" where none is near."""
    near = difflib.get_close_matches(str(given), list(names), n=1)
    return f" Did you mean {show(near[0])}?" if near else ""


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
        near = hint(value, [one for one in listed if isinstance(one, str)])
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(map(repr, listed))}.{near}")


def known(base: type) -> dict[str, Any]:
    """Our values of a kind by name: the public dataclasses that derive from `base`, or `base` where it is one."""
    ours = [cls for cls in (base, *base.__subclasses__()) if cls.__module__.startswith("sparkdeep.")]
    return {cls.__name__: cls for cls in ours if dataclasses.is_dataclass(cls) and not cls.__name__.startswith("_")}


def spelled(base: type) -> list[str]:
    """What `known` gives as it is written: `Median()`, `TrimmedMean(share)`."""
    return [f"{name}({', '.join(f.name for f in dataclasses.fields(cls))})" for name, cls in known(base).items()]


def instance(name: str, value: Any, base: type, word: str | None = None) -> None:
    """Refuse what is neither `word` nor a `base`, ours or the user's own."""
    if not isinstance(value, base) and value != word:
        near = hint(getattr(value, "__name__", value), spelled(base), show=str)
        raise ConfigError(f"{name}={value!r}: must be {', '.join(spelled(base))}, or {word!r}.{near}")


def changed(settings: Any, *names: str) -> list[str]:
    """`name=value` of those of a dataclass's fields that are not at their default."""
    defaults = {f.name: f.default for f in dataclasses.fields(settings)}
    return [f"{name}={value!r}" for name in names if (value := getattr(settings, name)) != defaults[name]]


_LARGEST: Final = 1 << 63


def misfit(cls: type, values: object, *, defaults: bool = False, nan: bool = False) -> str | None:
    """Say what is wrong with `values` as the fields of the dataclass `cls`; None where they fit.

    Args:
        cls: a dataclass of plain types, lists, tuples and dicts of them, and further dataclasses.
        values: name to value, as JSON or `state_dicts.unpack` gives them.
        defaults: whether a field with a default may be left out.
        nan: whether a number may be NaN.
    """
    if not isinstance(values, Mapping):
        return f"{cls.__name__} is a {type(values).__name__}, not an object."
    hints = _hints(cls)
    wanted = hints.keys() - (_optional(cls) if defaults else set())
    if odd := [*(wanted - values.keys()), *(values.keys() - hints.keys())]:
        return f"{cls.__name__}: fields {sorted(map(str, odd))} are missing or unknown."
    for name, hint in hints.items():
        if name in values and not fits(values[name], hint, defaults=defaults, nan=nan):
            return f"{cls.__name__}.{name} is {shown(values[name])}; expected {hint}."
    return None


def fits(value: Any, hint: Any, *, defaults: bool = False, nan: bool = False) -> bool:
    """Whether a value is of a type; whole numbers are of 64 bits, as arithmetic on larger ones fails in odd places."""
    if hint is str or hint is bool:  # a round's headers have little else, and these are asked for every round
        return isinstance(value, hint)
    if hint is float and isinstance(value, float):
        return nan or not math.isnan(value)
    if hint is int or hint is float:
        return isinstance(value, int) and not isinstance(value, bool) and -_LARGEST <= value < _LARGEST
    origin, items = typing.get_origin(hint), typing.get_args(hint)
    again = functools.partial(fits, defaults=defaults, nan=nan)
    if hint is Any:
        return True
    if origin in {types.UnionType, typing.Union}:
        return any(again(value, kind) for kind in items)
    if origin is typing.Literal:
        return isinstance(value, str) and value in items
    if origin is tuple and items[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(items) and all(map(again, value, items))
    if origin in {list, tuple}:
        return isinstance(value, origin) and all(again(one, items[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(again(k, items[0]) and again(v, items[1]) for k, v in value.items())
    if dataclasses.is_dataclass(hint) and not isinstance(value, hint):  # type: ignore[arg-type]  # hint is a class
        return misfit(hint, value, defaults=defaults, nan=nan) is None  # type: ignore[arg-type]
    return isinstance(value, hint)


def shown(value: object) -> str:
    """A value for a message: short, and also where it is too large or too deep to be written out."""
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that cannot be shown"


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _optional(cls: type) -> set[str]:
    missing = dataclasses.MISSING
    return {f.name for f in dataclasses.fields(cls) if f.default is not missing or f.default_factory is not missing}
