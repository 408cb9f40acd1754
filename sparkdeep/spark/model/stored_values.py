"""Settings as JSON, callables by name: only what `registry.resolve` allows comes back, and none of it is called.

Beside plain values and lists there are objects of one key: {"tuple": [...]}, {"map": {...}}, {"early_stopping": {...}},
{"value": "QSR", "fields": {...}}, {"name": "torch.optim:SGD"}, {"partial": name, "args": [...], "kwargs": {...}} and, for a module without tensors such as
a loss, {"module": name, "kwargs": {...}}.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from sparkdeep.algorithms import ALGORITHMS, Algorithm
from sparkdeep.checks import known, misfit, refuse_unknown, shown, spelled
from sparkdeep.errors import ConfigError, ModelLoadError
from sparkdeep.models.registry import reference_of, register, resolve
from sparkdeep.optim.aggregators import Aggregator
from sparkdeep.optim.asynchronous import Asynchronous
from sparkdeep.optim.drift import DriftCorrection
from sparkdeep.optim.local_work import LocalWork
from sparkdeep.optim.outer import DelayedNesterov, Downpour, FedAdam, FedYogi, SlowMo
from sparkdeep.settings.run import EarlyStopping
from sparkdeep.tensors.parameters import named_tensors

__all__ = ["NAMED_SETTINGS", "from_json", "named_value", "to_json"]

_BASES: Final = {
    "schedule": LocalWork,
    "aggregator": Aggregator,
    "drift_correction": DriftCorrection,
    "asynchronous": Asynchronous,
}
NAMED_SETTINGS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {"algorithm": ALGORITHMS} | {setting: known(base) for setting, base in _BASES.items()}
)
"""By setting, what makes such values by name: presets, or classes that nothing but their fields makes."""

for _outer in (DelayedNesterov, Downpour, FedAdam, FedYogi, SlowMo):
    register(_outer, f"sparkdeep:{_outer.__name__}")  # what an estimator's files name them
    register(_outer, f"sparkdeep.outer_optimizers:{_outer.__name__}")  # what the first version's files do


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
    arguments = {
        key: named_value(setting, value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if key != "name"
    }
    refuse_unknown([table["name"]], NAMED_SETTINGS[setting], setting)
    made = NAMED_SETTINGS[setting][table["name"]]
    refuse_unknown(arguments, inspect.signature(made).parameters, f"argument of {made.__name__}")
    try:
        return made(**arguments)
    except TypeError as error:
        raise ConfigError(f"{setting}={given!r}: {error}.") from error


_KINDS: Final = (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
_MODULES: Final = ("torch.nn", "torch.optim")
_VALUES: Final = {name: cls for base in (*_BASES.values(), Algorithm) for name, cls in known(base).items()}
_SCALARS: Final = (bool, int, float, str, type(None))


def to_json(value: Any, name: str) -> Any:
    """A setting as a JSON value from which `from_json` makes it again.

    Args:
        value: of the setting.
        name: of the setting, for messages.

    Raises:
        ConfigError: it cannot be stored, and what to do.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in _SCALARS:
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list):
        return [to_json(one, f"{name}[{i}]") for i, one in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [to_json(one, f"{name}[{i}]") for i, one in enumerate(value)]}
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {"map": {key: to_json(one, f"{name}[{key!r}]") for key, one in value.items()}}
    if isinstance(value, EarlyStopping):
        return {"early_stopping": asdict(value)}
    if type(value) in _VALUES.values():
        parts = {f.name: to_json(getattr(value, f.name), f"{name}.{f.name}") for f in fields(value)}
        return {"value": type(value).__name__, "fields": parts}
    if isinstance(value, functools.partial):
        return {
            "partial": _stored_name(value.func, f"{name}.func"),
            "args": [to_json(one, f"{name}.args[{i}]") for i, one in enumerate(value.args)],
            "kwargs": {key: to_json(one, f"{name}[{key!r}]") for key, one in value.keywords.items()},
        }
    if isinstance(value, nn.Module):
        return {"module": _stored_name(type(value), name), "kwargs": _arguments(value, name)}
    if callable(value):
        return {"name": _stored_name(value, name)}
    raise ConfigError(
        f"{name} is of class {type(value).__name__} and cannot be stored: what is saved are numbers, strings, lists, "
        f"mappings and named functions or classes.{_remedy(name)}"
    )


def from_json(stored: Any, name: str, *, allow_modules: Sequence[str] = ()) -> Any:
    """The setting that `to_json` stored.

    Args:
        stored: the JSON value.
        name: of the setting, for messages.
        allow_modules: modules whose functions a stored name may mean, beside registered ones and torch's own.

    Raises:
        ModelLoadError: a name is not allowed, or the value is damaged.
    """
    try:
        return _from_json(stored, name, allow_modules)
    except RecursionError as error:
        raise ModelLoadError(f"{name} is stored in more levels than any setting has: it is damaged.") from error


def _from_json(stored: Any, name: str, allow_modules: Sequence[str]) -> Any:
    def again(one: Any) -> Any:
        return _from_json(one, name, allow_modules)

    def found(stored_name: str, *arguments: Any) -> Callable[..., Any]:
        try:
            return _resolve(stored_name, allow_modules, arguments)
        except ModelLoadError as error:
            raise ModelLoadError(f"{name}: {error}") from error

    match stored:
        case None | bool() | int() | float() | str():
            return stored
        case list():
            return [again(one) for one in stored]
        case {"tuple": list(items), **rest} if not rest:
            return tuple(again(one) for one in items)
        case {"map": dict(items), **rest} if not rest:
            return {key: again(one) for key, one in items.items()}
        case {"early_stopping": dict(rule), **rest} if not rest:
            if complaint := misfit(EarlyStopping, rule, defaults=True):
                raise ModelLoadError(f"{name} is damaged: {complaint}")
            return EarlyStopping(**rule)
        case {"value": str(of), "fields": dict(parts), **rest} if not rest and of in _VALUES:
            try:
                return _VALUES[of](**{key: again(one) for key, one in parts.items()})
            except (TypeError, ConfigError) as error:
                raise _damaged(name, stored) from error
        case {"name": str(of), **rest} if not rest:
            return found(of)
        case {"partial": str(of), "args": list(args), "kwargs": dict(kwargs), **rest} if not rest:
            values, keywords = [again(one) for one in args], {key: again(one) for key, one in kwargs.items()}
            return functools.partial(found(of, *values, *keywords.values()), *values, **keywords)
        case {"module": str(of), "kwargs": dict(kwargs), **rest} if not rest:
            keywords = {key: again(one) for key, one in kwargs.items()}
            made = found(of, *keywords.values())
            if isinstance(made, type) and issubclass(made, nn.Module):
                try:
                    with torch.device("meta"):  # no memory for a module with tensors, which is never stored here
                        large = any(True for _ in named_tensors(made(**keywords)))
                    if not large:
                        return made(**keywords)
                except Exception as error:  # a constructor may raise anything for arguments that it never had
                    raise _damaged(name, stored) from error
    raise _damaged(name, stored)


def _resolve(name: str, allow_modules: Sequence[str] = (), arguments: Sequence[Any] = ()) -> Callable[..., Any]:
    found = resolve(name, allow_modules=[*_MODULES, *allow_modules], kinds=_KINDS, arguments=arguments)
    # Among torch's private functions are some that import whatever module they are told to.
    if inspect.isfunction(found) and str(found.__module__).startswith("torch.") and "._" in found.__module__:
        raise ModelLoadError(
            f"the stored name {name[:200]!r} is refused: it is a function of a private module of torch"
        )
    return found


def _damaged(name: str, stored: Any) -> ModelLoadError:
    return ModelLoadError(f"{name} is stored as {shown(stored)}, which this version does not know or is damaged.")


def _stored_name(target: Any, name: str) -> str:
    """The name under which `target` will be found again, tried here and now."""
    reference = reference_of(target, None) if callable(target) and not isinstance(target, nn.Module) else None
    shown = getattr(target, "__qualname__", type(target).__name__)
    if reference is None:
        raise ConfigError(
            f"{name} ({shown}) cannot be stored: it has no name by which it could be found again.{_remedy(name)}"
        )
    try:
        same = _resolve(reference.name) is target
    except ModelLoadError:
        same = False
    if not same:
        raise ConfigError(
            f"{name} ({shown}) cannot be stored as {reference.name!r}, as loading would refuse that name: it takes torch's "
            f"modules, losses, optimizers and schedulers, nn.Module classes, and what is registered.{_remedy(name)}"
        )
    return reference.name


def _remedy(name: str) -> str:
    param = re.split(r"[.\[]", name, maxsplit=1)[0]
    if param == "validation":
        return " Give validation= a fraction or the name of a boolean column, or set it to None before saving."
    if param in _BASES:
        return f" Take {param} out before saving, or use one of {', '.join(spelled(_BASES[param]))}."
    return (
        f" Define a function or class at the top of a module and register it (@sparkdeep.register), there and in the "
        f"session that loads; or take {param} out before saving."
    )


def _arguments(module: nn.Module, name: str) -> dict[str, Any]:
    """The constructor's arguments of a module without tensors and parts, read from its attributes of the same names."""
    cls = type(module)
    if any(True for _ in named_tensors(module)) or any(True for _ in module.children()):
        raise ConfigError(f"{name} ({cls.__name__}) has tensors or parts, which are not stored here.{_remedy(name)}")
    wanted = inspect.signature(cls).parameters
    kwargs = {
        key: getattr(module, key) for key, one in wanted.items() if _differs(getattr(module, key, one.default), one)
    }
    try:
        stored = {key: to_json(value, f"{name}.{key}") for key, value in kwargs.items()}
        same = _settings(cls(**kwargs)) == _settings(module)
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ConfigError(
            f"{name} ({cls.__name__}) cannot be stored: its constructor's arguments cannot be told from its attributes."
            f"{_remedy(name)}"
        )
    return stored


def _differs(value: Any, parameter: inspect.Parameter) -> bool:
    return value is not parameter.default and value != parameter.default


def _settings(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
