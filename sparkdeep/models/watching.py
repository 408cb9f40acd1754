"""What training changes beside everything that rounds carry: numbers and tensors in attributes, closures and containers."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import FunctionType
from typing import Any, Final, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn

from sparkdeep.models.carried import declared_rule, prefixed_modules
from sparkdeep.models.program import Program, parts_inside
from sparkdeep.tensors.parameters import named_tensors

__all__ = ["AttributeWatch", "is_installed"]

Marks: TypeAlias = "dict[str, tuple[Any, ...]]"

_DEPTH: Final = 3
_MOST_ITEMS: Final = 256
_MODULE_STATE: Final = frozenset(vars(nn.Module()))
_OTHER: Final = ("other",)
_INSTALLED: Final = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}


@final
class AttributeWatch:
    """Compares attributes before a round and after it.

    Looked at are modules (the model's, and those of the loss and the like) and the user's callables themselves; not torch's own
    modules, nor those with extra state, which say themselves what they keep. Of modules of installed packages, which cache
    what they can compute again, nothing is told.

    Args:
        program: the user's objects.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._modules = [
            (prefix, module)
            for prefix, module in prefixed_modules(program)
            if type(module).get_extra_state is nn.Module.get_extra_state and not is_installed(type(module))
        ]
        self._carried = {id(t) for _, m in prefixed_modules(program) for _, t in named_tensors(m)}

    def marks(self) -> Marks:
        """Of every attribute that holds a number, a tensor, or something with these in it."""
        found = {}
        for name, value in self._values():
            if declared_rule(self._program, name) is None and not (
                isinstance(value, Tensor) and id(value) in self._carried
            ):
                found[name] = _mark(value)
        return found

    def _values(self) -> Iterator[tuple[str, Any]]:
        for prefix, module in self._modules:
            yield from ((f"{prefix}{k}", v) for k, v in vars(module).items() if k not in _MODULE_STATE)
        for name in ("loss", "training_step", "preprocess", "augment"):
            yield from _held(name, getattr(self._program, name), set(), 0)

    def changed(self, before: Marks) -> list[str]:
        """Names of what is not as it was."""
        now = self.marks()
        names = sorted(before.keys() | now.keys())
        return [name for name in names if before.get(name, _OTHER) != now.get(name, _OTHER)]


def _held(place: str, part: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    """The values that a callable holds itself, beside modules."""
    where = part if isinstance(part, FunctionType) else type(part)
    if isinstance(part, nn.Module) or id(part) in seen or depth > _DEPTH or is_installed(where):
        return
    seen.add(id(part))
    for at, value in parts_inside(part):
        if _mark(value) != _OTHER:
            yield f"{place}{at}", value
        else:
            yield from _held(f"{place}{at}", value, seen, depth + 1)


def is_installed(what: Any) -> bool:
    """Whether a class or function is of an installed package, and not the user's own."""
    if what.__module__ is None or what.__module__.partition(".")[0] in {"torch", "sparkdeep"}:
        return True
    file = getattr(sys.modules.get(what.__module__), "__file__", None)
    return file is not None and any(root in Path(file).resolve().parents for root in _INSTALLED)


def _mark(value: Any, depth: int = 0) -> tuple[Any, ...]:
    """What differs where a value does; `_OTHER` of what is neither a number nor a tensor, nor holds one."""
    if isinstance(value, bool | int | float | complex | np.number | np.bool_):
        return "number", repr(value)
    if isinstance(value, Tensor):
        return _tensor_mark(value)
    if isinstance(value, np.ndarray):
        return ("array", value.shape, hash(value.tobytes())) if value.dtype != object else _OTHER
    if isinstance(value, Mapping | list | tuple) and depth < _DEPTH:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        inner = [(str(key), _mark(one, depth + 1)) for key, one in islice(items, _MOST_ITEMS >> 4 * depth)]
        kept = [pair for pair in inner if pair[1] != _OTHER]
        return ("items", len(value), tuple(kept)) if kept or not value else _OTHER
    return _OTHER


def _tensor_mark(value: Tensor) -> tuple[Any, ...]:
    own = value.detach()
    if own.layout != torch.strided or own.device.type == "meta":
        return "tensor", str(own.layout), tuple(own.shape)
    flat = own.resolve_conj().resolve_neg().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    wide = flat.double()
    return "tensor", str(own.dtype), tuple(own.shape), repr(float(wide.sum())), repr(float(wide.square().sum()))
