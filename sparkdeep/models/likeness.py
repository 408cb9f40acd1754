"""What tells two programs apart that look alike by name: a network's structure and settings, and the code of the user's functions."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from sparkdeep.models.program import Program
from sparkdeep.models.watching import is_installed
from sparkdeep.tensors.parameters import raw_bytes

__all__ = ["details_of", "digest_of_tensor"]

_MODULE_STATE: Final = frozenset(vars(nn.Module()))
_DEPTH: Final = 8
_MOST: Final = 50_000
_CALLABLES: Final = ("loss", "training_step", "optimizer", "lr_scheduler", "preprocess", "augment", "collate")


def details_of(program: Program) -> dict[str, Any]:
    """JSON values that differ where the network, its frozen parameters, or the code of the user's functions do.

    Of a network: the classes of its parts, what they keep in attributes, and the code of classes of the user's own. Values of trained
    parameters are left out: those of a module instance differ whenever a script builds it anew after a crash. Bytecode is what
    one version of Python makes of the source, without names of files and numbers of lines.
    """
    look = _Look(program.model)
    frozen = hashlib.blake2b(digest_size=8)
    for name, parameter in program.model.named_parameters():
        if not parameter.requires_grad:
            frozen.update(f"{name} {digest_of_tensor(parameter)}".encode())
    return {
        "model": {name or "(root)": look.part(module) for name, module in program.model.named_modules()},
        "frozen": frozen.hexdigest(),
        "code": {name: look.of(getattr(program, name)) for name in _CALLABLES},
    }


def digest_of_tensor(tensor: Tensor) -> str:
    """16 hexadecimal digits of its elements."""
    own = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    return hashlib.blake2b(raw_bytes(own.reshape(-1).view(torch.uint8)), digest_size=8).hexdigest()


class _Look:
    """Describes values, to a certain depth and `_MOST` of them: objects of a user's may hold each other, or a table."""

    def __init__(self, model: nn.Module) -> None:
        self._parts = {id(module): name for name, module in model.named_modules()}
        self._own = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        self._classes: dict[type, str] = {}
        self._left = _MOST

    def part(self, module: nn.Module) -> list[Any]:
        """A module without the modules in it."""
        kept = {k: self.of(v) for k, v in vars(module).items() if k not in _MODULE_STATE and not k.startswith("_")}
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        return [self._class(type(module)), kept, [self.of(hook) for hook in hooks]]

    def of(self, value: Any, depth: int = 0) -> Any:
        """Any value of the user's."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        self._left -= 1
        if depth > _DEPTH or self._left < 0:
            return "..."
        inner = functools.partial(self.of, depth=depth + 1)
        if isinstance(value, Tensor):
            own = id(value) in self._own or value.requires_grad
            return [str(value.dtype), list(value.shape), "" if own else digest_of_tensor(value)]
        if isinstance(value, nn.Module):
            name = self._parts.get(id(value))
            return [f"model.{name}"] if name is not None else [self._whole(part) for part in value.modules()]
        if isinstance(value, functools.partial):
            return [inner(value.func), inner(value.args), inner(value.keywords)]
        if isinstance(value, types.MethodType):
            return [value.__name__, inner(value.__self__)]
        if isinstance(value, types.FunctionType):
            return self._function(value, inner)
        if isinstance(value, type):
            return self._class(value)
        if is_dataclass(value):
            return [self._class(type(value)), {f.name: inner(getattr(value, f.name)) for f in fields(value)}]
        if isinstance(value, Mapping):
            return {str(key): inner(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [inner(one) for one in value]
        if isinstance(value, torch.dtype | torch.device):
            return str(value)
        if (
            hasattr(value, "__dict__")
            and not callable(getattr(value, "__array__", None))
            and not is_installed(type(value))
        ):
            kept = {key: inner(one) for key, one in vars(value).items() if not key.startswith("__")}
            return [self._class(type(value)), kept]
        return getattr(value, "__qualname__", type(value).__qualname__)

    def _whole(self, module: nn.Module) -> list[Any]:
        tensors = [*module._parameters.items(), *module._buffers.items()]
        return [self.part(module), {name: self.of(tensor) for name, tensor in tensors}]

    def _function(self, function: types.FunctionType, inner: Any) -> Any:
        if is_installed(function):
            return f"{function.__module__}:{function.__qualname__}"
        cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
        return [_code(function.__code__), inner(function.__defaults__), inner(function.__kwdefaults__), inner(cells)]

    def _class(self, cls: type) -> str:
        """Its name, and of one of the user's own its code."""
        if cls not in self._classes:
            name = f"{cls.__module__.partition('.')[0]}:{cls.__qualname__}"
            if not is_installed(cls):
                functions = sorted((k, v) for k, v in vars(cls).items() if isinstance(v, types.FunctionType))
                name += " " + _digest(repr([(key, _code(one.__code__)) for key, one in functions]).encode())
            self._classes[cls] = name
        return self._classes[cls]


def _code(code: types.CodeType) -> str:
    """16 hexadecimal digits of what a function does, and of the functions in it."""
    constants = [_code(one) if isinstance(one, types.CodeType) else _constant(one) for one in code.co_consts]
    names = [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
    return _digest(code.co_code + repr([names, constants]).encode())


def _constant(value: Any) -> str:
    """The order of a set of texts differs from process to process."""
    return str(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
