"""The user's objects on their way to replicas: one cloudpickle, with the model's tensors left out.

The module's parameters and buffers travel over the wire of the coordinator (and again with every round), so the pickle
holds the module's structure only: each tensor is replaced by its name (`persistent_id`), which also keeps tied tensors
tied. As it is one pickle, what a loss, a training step or an optimizer's factory holds of the model, be it in a closure, is
the replica's own there. The bytes go out inside Spark's own task closure and nowhere else; nothing that comes back from an
executor, or lies in a file, is ever unpickled.
"""

from __future__ import annotations

import functools
import io
import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, cast, final

import cloudpickle
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from sparkdeep.errors import ConfigError, PreflightError
from sparkdeep.models.keras import KerasNetwork, choose_keras_backend
from sparkdeep.models.program import Program
from sparkdeep.tensors.parameters import fill, named_tensors

__all__ = ["check_trained", "copied", "pack_program", "unpack_program"]

_PLAIN: Final = (Tensor, nn.Parameter, nn.UninitializedParameter, nn.UninitializedBuffer)


@final
@dataclass(frozen=True)
class _Shape:
    """What an empty tensor is made from."""

    dtype: str
    shape: tuple[int, ...] | None
    """None of a lazy one."""
    is_parameter: bool
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> _Shape:
        dtype, shape = str(tensor.dtype).removeprefix("torch."), None if is_lazy(tensor) else tuple(tensor.shape)
        return cls(dtype, shape, isinstance(tensor, nn.Parameter), tensor.requires_grad)

    def empty(self) -> Tensor:
        """One of zeros."""
        dtype = getattr(torch, self.dtype)
        if self.shape is None:
            kind: Any = nn.UninitializedParameter if self.is_parameter else nn.UninitializedBuffer
            return cast("Tensor", kind(requires_grad=self.requires_grad, dtype=dtype))
        tensor = torch.zeros(self.shape, dtype=dtype)
        return nn.Parameter(tensor, requires_grad=self.requires_grad) if self.is_parameter else tensor


class _Pickler(cloudpickle.Pickler):
    """Writes the module's tensors as their names."""

    def __init__(self, file: io.BytesIO, names: Mapping[int, str]) -> None:
        super().__init__(file)
        self._names = names

    def reducer_override(self, obj: Any) -> Any:
        # The class of a module with parametrizations (weight_norm, orthogonal, ...) is made by torch at run time, and
        # torch refuses to pickle it. The module's own class and its state suffice, if that class is injected again.
        if isinstance(obj, nn.Module) and parametrize.is_parametrized(obj):
            return _parametrized, (type(obj).__bases__[0],), obj.__dict__, None, None, _set_parametrized
        return super().reducer_override(obj)

    def persistent_id(self, obj: Any) -> Any:
        return self._names.get(id(obj)) if isinstance(obj, Tensor) else None


@final
class _Looking(_Pickler):
    """Finds trainable parameters that are not the model's; writes no tensor."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__(io.BytesIO(), names)
        self.found: list[Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        if isinstance(obj, nn.Parameter) and obj.requires_grad and id(obj) not in self._names:
            self.found.append(obj)
        return "tensor"


def _strangers(value: Any, model: nn.Module) -> list[Tensor]:
    """The trainable parameters that a callable holds, in closures and attributes too, and that are not the model's.

    A function that is imported by name is not looked into by pickle; what its module's globals hold is.
    """
    looking = _Looking(_names_of(model))
    looking.dump([value, _globals_of(value)])
    return looking.found


def _globals_of(value: Any) -> list[Any]:
    """Modules and parameters among the globals that a function names."""
    while isinstance(value, functools.partial):
        value = value.func
    value = getattr(value, "__func__", value)
    code, names = getattr(value, "__code__", None), getattr(value, "__globals__", {})
    if code is None:
        return []
    return [names[name] for name in code.co_names if isinstance(names.get(name), nn.Module | nn.Parameter)]


def _parametrized(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


def _set_parametrized(module: nn.Module, state: dict[str, Any]) -> None:
    module.__dict__.update(state)
    parametrize._inject_new_class(module)
    for name in cast("nn.ModuleDict", module.parametrizations):
        parametrize._inject_property(module, name)


class _Unpickler(pickle.Unpickler):
    """Gives each name one tensor."""

    def __init__(self, data: bytes, tensor: Callable[[str], Tensor]) -> None:
        super().__init__(io.BytesIO(data))
        self._tensor = functools.cache(tensor)

    def persistent_load(self, pid: str) -> Tensor:
        return self._tensor(pid)

    def program(self) -> Program:
        parts, marks = self.load()
        tensors = dict(named_tensors(parts["model"]))
        for name, (attributes, hooks, after) in marks.items():
            own = tensors[name]
            vars(own).update(attributes)
            for hook in hooks:
                own.register_hook(hook)
            for hook in after:
                own.register_post_accumulate_grad_hook(hook)
        return Program(**parts)


def pack_program(program: Program) -> bytes:
    """Serialize `program` for the task closure.

    Raises:
        PreflightError: a part cannot be pickled; the message names the attribute.
        ConfigError: a lazy parameter has no shape yet, or a tensor is of a class that would not arrive.
    """
    parts, named = _dumped(program), dict(named_tensors(program.model))
    for name, tensor in named.items():
        if is_lazy(tensor):
            raise ConfigError(
                f"parameter {name!r} is lazy and has no shape yet: run one batch through the module first."
            )
    shapes = {name: _Shape.of(tensor) for name, tensor in named.items()}
    return bytes(cloudpickle.dumps((shapes, parts, isinstance(program.model, KerasNetwork))))


def unpack_program(data: bytes) -> Program:
    """Rebuild a program on a replica; its module's tensors are zeros until they are loaded."""
    shapes, parts, keras = pickle.loads(data)  # noqa: S301 (the user's own program, from Spark's task closure)
    if keras:  # before one of the user's modules imports it
        choose_keras_backend("torch")
    return _Unpickler(parts, lambda name: shapes[name].empty()).program()


def copied(program: Program) -> Program:
    """A program of its own objects, as a replica gets it, with the values of the tensors; nothing is shared with the given one.

    Raises:
        PreflightError, ConfigError: as of `pack_program`, but for lazy parameters, which stay lazy.
    """
    named = dict(named_tensors(program.model))
    left = {name: tensor for name, tensor in named.items() if not is_lazy(tensor)}

    def tensor(name: str) -> Tensor:
        own = _Shape.of(named[name]).empty()
        if name in left:
            own.data.copy_(left.pop(name).detach())
        return own

    own = _Unpickler(_dumped(program), tensor).program()
    if isinstance(program.model, KerasNetwork):
        program.model.check_rebuilt(cast("KerasNetwork", own.model))
    fill(own.model, left)  # those of a model that makes its own tensors, as one of Keras does
    return own


def _dumped(program: Program) -> bytes:
    """Everything but the values of the module's tensors, which need not have a shape yet."""
    _check_memory(program.model)
    names, buffer = _names_of(program.model), io.BytesIO()
    # One pickle for all: a training_step that is a method of the model must meet the same model on the replica.
    parts = {field.name: getattr(program, field.name) for field in fields(program)}
    marks = {name: marks for name, tensor in named_tensors(program.model) if any(marks := _marks(name, tensor))}
    try:
        _Pickler(buffer, names).dump((parts, marks))
    except Exception as error:
        where = next((w for name, value in parts.items() if (w := _culprit(value, name, names))), "the program")
        raise PreflightError(
            f"{where} cannot be pickled and so cannot be sent to the executors: {type(error).__name__}: {error}. "
            "Open files, locks, sockets and sessions must be made inside the model (lazily, on the executor), "
            "not kept as attributes."
        ) from error
    return buffer.getvalue()


def _check_memory(model: nn.Module) -> None:
    """Refuse tensors that share memory without being one tensor: each would be copied, trained and averaged on its own."""
    storages: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in [*named_tensors(model), *_kept_tensors(model)]:
        if not is_lazy(tensor) and tensor.layout == torch.strided and tensor.numel() and tensor.device.type == "cpu":
            storages.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    for shared in storages.values():
        for (one, tensor), (other, twin) in itertools.combinations(shared, 2):
            if tensor is not twin and _overlap(tensor, twin):
                first, second = sorted([one, other])
                raise ConfigError(
                    f"{first!r} and {second!r} share memory and are two tensors: a replica would have them apart, and the last one "
                    "written would win. Let both names stand for one Parameter, make the one from the other in forward() (as "
                    "F.linear(x, self.encoder.weight.t()) does), or .clone() what is a constant."
                )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether an element of the one lies in the other; columns of one table that lie between each other do not."""
    try:
        return bool(np.shares_memory(_elements(one), _elements(other), max_work=1_000_000))  # type: ignore[arg-type]  # numpy's stubs know two values
    except np.exceptions.TooHardError:  # for strides that no layer has
        return True


def _elements(tensor: Tensor) -> Any:
    """The tensor's memory as bytes, (..., itemsize), whatever its dtype; nothing is copied."""
    size = tensor.itemsize
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    strides = [*(int(stride) * size for stride in tensor.stride()), 1]
    at = int(tensor.storage_offset()) * size
    return np.lib.stride_tricks.as_strided(whole[at:], (*tensor.shape, size), strides, writeable=False)


def _kept_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors in plain attributes, and in lists, tuples and dicts there."""
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name in {"_parameters", "_buffers", "_modules"}:
                continue
            inside = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            )
            yield from ((f"{prefix}.{name}".lstrip("."), part) for part in inside if isinstance(part, Tensor))


def _names_of(model: nn.Module) -> dict[int, str]:
    return {id(tensor): name for name, tensor in named_tensors(model)}


def _marks(name: str, tensor: Tensor) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """What hangs on a tensor: attributes, hooks of its gradient, and those after the gradient was accumulated."""
    if type(tensor) not in _PLAIN:
        raise ConfigError(
            f"{name!r} is a {type(tensor).__name__}, a tensor class of its own, of which a replica would get a plain tensor. Keep an "
            "nn.Parameter or a buffer, and make the other one from it in forward()."
        )
    after = getattr(tensor, "_post_accumulate_grad_hooks", None) or {}
    return dict(vars(tensor)), list((tensor._backward_hooks or {}).values()), list(after.values())


def _culprit(value: Any, path: str, names: Mapping[int, str]) -> str | None:
    """The longest attribute path at or below `value` whose pickling fails; None when `value` can be pickled."""
    try:
        _Pickler(io.BytesIO(), names).dump(value)
    except Exception:  # noqa: BLE001 (looking for the part that fails; the failure itself is raised by the caller)
        return next((w for p, child in _children(value, path) if (w := _culprit(child, p, names))), path)
    return None


def _children(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        modules = [(f"{path}.{k}", v) for k, v in value._modules.items()]
        return modules + [(f"{path}.{k}", v) for k, v in vars(value).items() if not k.startswith("_")]
    if isinstance(value, Mapping):
        return [(f"{path}[{k!r}]", v) for k, v in value.items()]
    if isinstance(value, functools.partial):
        return [*((f"{path}.args[{i}]", v) for i, v in enumerate(value.args)), *_children(value.keywords, path)]
    if hasattr(value, "__dict__") and not isinstance(value, type):
        return [(f"{path}.{k}", v) for k, v in vars(value).items()]
    return []


def check_trained(program: Program) -> None:
    """Refuse a loss with trainable parameters of its own: only the model's are trained, averaged and returned.

    Raises:
        ConfigError: with their number and shapes.
    """
    for where in ("loss", "training_step"):
        found = _strangers(getattr(program, where), program.model)
        if found:
            shapes = str([tuple(parameter.shape) for parameter in found[:3]])[1:-1]
            raise ConfigError(
                f"{where}= holds {len(found)} trainable parameters that are not the model's (shapes {shapes}) and would not be trained: "
                "only the model's are. Make their module part of the model and use training_step(model, batch), or freeze it "
                "with requires_grad_(False)."
            )
