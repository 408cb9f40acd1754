"""What a stored model's name may resolve to, so that loading a file runs nothing that the file chose."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import nn

from sparkdeep.errors import ConfigError, ModelLoadError
from sparkdeep.models.generators import forked

__all__ = ["ModelReference", "Scalar", "import_factory", "reference_of", "register", "resolve"]

Scalar: TypeAlias = "str | int | float | bool | None"
Factory = TypeVar("Factory", bound=Callable[..., Any])

_SCALARS = (str, int, float, bool, type(None))
_SPEC = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*(?:\.[^\W\d]\w*)*)")

_INSTALLED = frozenset({"site-packages", "dist-packages"})

_registered: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True, kw_only=True)
class ModelReference:
    """How a module can be built again: a name and plain arguments, which is all that a model folder stores."""

    name: str
    """"package.module:qualified.name", or the name given to `register`."""

    args: tuple[Scalar, ...] = ()
    """Positional arguments."""

    kwargs: Mapping[str, Scalar] = field(default_factory=dict)
    """Keyword arguments."""

    def to_json(self) -> dict[str, Any]:
        """Return the reference as JSON values."""
        return {"name": self.name, "args": list(self.args), "kwargs": dict(self.kwargs)}

    @classmethod
    def from_json(cls, value: object) -> ModelReference:
        """Read a stored reference; ModelLoadError unless it is a name with plain arguments."""
        match value:
            case {"name": str(name), "args": list(args), "kwargs": dict(kwargs)}:
                if _are_scalars(args) and _are_scalars(kwargs.values()):
                    return cls(name=name, args=tuple(args), kwargs=kwargs)
        raise ModelLoadError(
            f"the stored model reference {str(value)[:200]} is not a name with strings, numbers, booleans and nulls as "
            "arguments; load with model=, giving the class"
        )


@overload
def register(factory: Factory, name: str | None = None) -> Factory: ...
@overload
def register(factory: None = None, name: str | None = None) -> Callable[[Factory], Factory]: ...
def register(factory: Any = None, name: str | None = None) -> Any:
    """Let a stored model name this factory: a class or function of a notebook, or one that builds a module.

    Use it as `@register`, `@register(name="net")` or `register(Net)`, in the session that saves (for a `name` of its
    own) and in the one that loads. Registering again under the same name replaces, as running a notebook cell again does.

    Args:
        factory: an nn.Module subclass, or a callable that returns a module.
        name: what the model folder stores; by default "module:qualified.name".

    Returns:
        `factory` itself.

    Raises:
        ConfigError: it cannot be called, or has no name of its own.
    """
    if factory is None:
        return lambda decorated: register(decorated, name)
    if not callable(factory) or isinstance(factory, nn.Module):
        raise ConfigError(f"{_kind(factory)} cannot be registered: it must be an nn.Module subclass or a function")
    default = _default_name(factory)
    if name is None and default is None:
        raise ConfigError(f"{_kind(factory)} has no name of its own to be stored under: register(factory, name='...')")
    _registered[name or str(default)] = factory
    return factory


def reference_of(model: object, model_args: Mapping[str, Any] | None) -> ModelReference | None:
    """Return how `model`, as the user gave it, can be built again, or None if a name and scalars do not suffice.

    A module instance has a reference only where its class, called without arguments, builds the same module but for
    the tensors' values: other settings would be lost silently.

    Args:
        model: an nn.Module subclass, a function, a functools.partial of one, "package.module:name", or an instance.
        model_args: keyword arguments for all but an instance.
    """
    if isinstance(model, nn.Module):
        name = _name_of(type(model))
        return ModelReference(name=name) if name is not None and _is_default_build(model) else None
    args: tuple[Any, ...] = ()
    kwargs = dict(model_args or {})
    if isinstance(model, functools.partial):
        args, kwargs = model.args, {**model.keywords, **kwargs}
        model = model.func
    name = model if isinstance(model, str) else _name_of(model)
    if name is None or not _are_scalars(args) or not _are_scalars(kwargs.values()):
        return None
    return ModelReference(name=name, args=args, kwargs=kwargs)


def resolve(
    name: str,
    *,
    allow_modules: Sequence[str] = (),
    kinds: tuple[type, ...] = (nn.Module,),
    arguments: Iterable[Any] = (),
) -> Callable[..., Any]:
    """Return the factory that a stored `name` stands for. It is not called here.

    Registered names come first. Otherwise the name's module must already be imported, or be listed in
    `allow_modules` (itself or a package above it), in which case it is imported; and what it names there must be a
    subclass of one of `kinds` or a registered factory. A function is accepted only if it is defined in a listed module.
    A class whose constructor comes from an installed package other than torch is given no text from a file unless its
    module is listed: some such constructors load whatever a path or a repository's name refers to, its code included.

    Args:
        name: as stored.
        allow_modules: modules and packages that may be imported, and whose functions may be named.
        kinds: what a class may be.
        arguments: what the file stores beside the name.

    Raises:
        ModelLoadError: the rules refuse the name.
    """
    if isinstance(allow_modules, str):
        raise ConfigError(f"allow_modules={allow_modules!r} is a string: give a list, [{allow_modules!r}]")
    if name in _registered:
        return _registered[name]
    match = _SPEC.fullmatch(name)
    if match is None:
        raise _refusal(name, "it is no registered name, and not of the form package.module:name either")
    module_name, qualname = match.groups()
    module = _module_named(module_name, name, allow_modules)
    target = _look_up(name, module, qualname)
    if any(target is factory for factory in _registered.values()):
        return target
    if isinstance(target, type) and issubclass(target, kinds):
        if _has_text(arguments) and _is_installed(target) and not _is_listed(target.__module__, allow_modules):
            raise _refusal(
                name,
                f"the file gives it texts, and {target.__qualname__} comes from an installed package, where a constructor may "
                "load whatever a text says",
            )
        return target
    # What counts is where it is defined: a listed module may well import subprocess.run.
    if inspect.isfunction(target) and _is_listed(target.__module__, allow_modules):
        return target
    raise _refusal(
        name,
        f"it is {_kind(target)}: a stored name may stand for an nn.Module subclass, a registered factory, or a "
        "function defined in a module of allow_modules",
    )


def _module_named(module_name: str, name: str, allow_modules: Sequence[str]) -> Any:
    if not _is_listed(module_name, allow_modules):
        found = sys.modules.get(module_name)
        if found is None:
            raise _refusal(name, f"{module_name} is neither imported here nor listed in allow_modules")
        return found
    try:
        return importlib.import_module(module_name)
    except ImportError as exc:
        raise _refusal(name, f"{module_name} cannot be imported ({exc})") from exc


def import_factory(spec: str) -> Callable[..., Any]:
    """Import what a configuration that the user wrote calls "package.module:name".

    Raises:
        ConfigError: it has another form, the module or the name does not exist, or it is not callable.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ConfigError(f"{spec!r} is not of the form 'package.module:name'; write for instance 'torch.nn:MSELoss'")
    module_name, qualname = match.groups()
    if module_name.partition(".")[0] == "sparkdeep" and spec in _registered:
        return _registered[spec]  # a class of ours, whose module may have moved
    try:
        target: Any = importlib.import_module(module_name)
    except ImportError as exc:
        raise ConfigError(
            f"{spec!r}: module {module_name!r} cannot be imported ({exc}); install it, or put its folder on PYTHONPATH"
        ) from exc
    for part in qualname.split("."):
        if not hasattr(target, part):
            near = difflib.get_close_matches(part, dir(target), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; name one that it defines"
            raise ConfigError(f"{spec!r}: {_kind(target)} has no {part!r}{hint}")
        target = getattr(target, part)
    if not callable(target):
        raise ConfigError(f"{spec!r} is {_kind(target)}, which cannot be called; name a class or a function")
    factory: Callable[..., Any] = target
    return factory


def _refusal(name: str, why: str) -> ModelLoadError:
    return ModelLoadError(
        f"the stored model name {name[:200]!r} is refused: {why}. Loading runs no code that a file chose. Import or "
        "define the class first and call sparkdeep.register(Net), or load with model=Net, or, if you trust that "
        "package, with allow_modules=['package']"
    )


def _look_up(name: str, module: Any, qualname: str) -> Any:
    # Statically: a property, a descriptor or a module's __getattr__ would be code that the file chose.
    first, *rest = qualname.split(".")
    target = getattr(module, "__dict__", {}).get(first, _MISSING)
    for part in rest:
        if not isinstance(target, type):
            target = _MISSING
            break
        target = inspect.getattr_static(target, part, _MISSING)
    if target is _MISSING:
        raise _refusal(name, f"{module.__name__} has no class or function {qualname!r}")
    return target


_MISSING = object()


def _is_listed(module_name: str | None, allow_modules: Sequence[str]) -> bool:
    return any(module_name == listed or str(module_name).startswith(f"{listed}.") for listed in allow_modules)


def _has_text(values: Iterable[Any]) -> bool:
    return any(
        isinstance(value, str)
        or (isinstance(value, list | tuple) and _has_text(value))
        or (isinstance(value, Mapping) and _has_text(value.values()))
        for value in values
    )


def _is_installed(cls: type) -> bool:
    """Whether its constructor was written by somebody other than the user and torch."""
    module = next(one for one in cls.__mro__ if "__init__" in vars(one)).__module__
    file = Path(getattr(sys.modules.get(module), "__file__", None) or "")
    return module.partition(".")[0] not in {"torch", "sparkdeep"} and not _INSTALLED.isdisjoint(file.parts)


def _are_scalars(values: Any) -> bool:
    # Exactly these types: a subclass (numpy's float64, an enumeration) would come back as something else.
    return all(type(value) in _SCALARS for value in values)


def _default_name(factory: Any) -> str | None:
    name = f"{getattr(factory, '__module__', '')}:{getattr(factory, '__qualname__', '')}"
    return None if name.startswith(":") or name.endswith((":", "<lambda>")) else name


def _name_of(factory: Any) -> str | None:
    for name, registered in _registered.items():
        if registered is factory:
            return name
    is_plain = isinstance(factory, type) or inspect.isfunction(factory)
    # A class made inside a function cannot be found again by name.
    return None if not is_plain or "<" in factory.__qualname__ else _default_name(factory)


def _is_default_build(module: nn.Module) -> bool:
    factory = type(module)
    try:
        inspect.signature(factory).bind()
    except (TypeError, ValueError):  # it needs arguments, or hides what it takes
        return False
    try:
        with forked(), torch.device("meta"):
            fresh = factory()
    except Exception:  # noqa: BLE001 - a constructor that fails by itself is one that no name can stand for
        return False
    ours, theirs = dict(module.named_modules()), dict(fresh.named_modules())
    same_parts = ours.keys() == theirs.keys() and all(
        type(part) is type(theirs[name]) and _settings(part) == _settings(theirs[name]) for name, part in ours.items()
    )
    return same_parts and _shapes(module) == _shapes(fresh)


def _shapes(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {
        name: (type(tensor), tensor.dtype, None if nn.parameter.is_lazy(tensor) else tensor.shape)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


_MODULE_STATE = frozenset(nn.Module().__dict__)


def _settings(part: nn.Module) -> dict[str, Any]:
    """Return what configures one part besides its tensors; what cannot be compared equals nothing."""
    hooks = {"hooks": (len(part._forward_pre_hooks), len(part._forward_hooks))}
    of_torch = type(part).__module__.startswith("torch.nn.")  # its private attributes are derived from its public ones
    return hooks | {
        key: value if _is_comparable(value) else object()
        for key, value in vars(part).items()
        if key not in _MODULE_STATE and not (of_torch and key.startswith("_"))
    }


def _is_comparable(value: Any) -> bool:
    if type(value) in {list, tuple}:
        return all(_is_comparable(item) for item in value)
    return type(value) in _SCALARS or inspect.isroutine(value) or isinstance(value, type | torch.dtype)


def _kind(value: Any) -> str:
    if inspect.ismodule(value) or isinstance(value, type) or inspect.isroutine(value):
        kind = "module" if inspect.ismodule(value) else "class" if isinstance(value, type) else "function"
        return f"the {kind} {getattr(value, '__qualname__', getattr(value, '__name__', '?'))}"
    return f"an object of class {type(value).__name__}"
