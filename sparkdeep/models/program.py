"""The user's objects on their way to replicas: one cloudpickled field, with the model's tensors left out.

The module's parameters and buffers travel over the wire of the coordinator (and again with every round), so the
pickle holds the module's structure only: each tensor is replaced by its name (`persistent_id`), which also keeps
tied tensors tied. The bytes go out inside Spark's own task closure and nowhere else; nothing that comes back from an
executor, or lies in a file, is ever unpickled.
"""

from __future__ import annotations

import functools
import inspect
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MethodType
from typing import Any, Final, cast

import cloudpickle
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from sparkdeep.data.batches import Batch
from sparkdeep.errors import ConfigError, PreflightError
from sparkdeep.models.keras import KerasNetwork, choose_keras_backend
from sparkdeep.tensors.parameters import named_tensors

__all__ = [
    "NO_STEPS",
    "Program",
    "check_picklable",
    "check_trained",
    "inner_optimizer",
    "other_modules",
    "pack_program",
    "prepared",
    "unpack_program",
]


NO_STEPS: Final = functools.partial(torch.optim.SGD, lr=0.0)
"""The optimizer of replicas that take no steps (`work="gradient"`); the driver has the outer one, and the schedule."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """All of the user's objects that a replica runs."""

    model: nn.Module
    """The module; on the driver with its values, on a replica with empty tensors until the first message."""
    loss: Callable[..., Tensor] | None
    """`loss(output, label)`, or None with `training_step`."""
    optimizer: Callable[..., torch.optim.Optimizer]
    """Called with the list of trainable parameters."""
    lr_scheduler: Callable[..., Any] | None = None
    """Called with the optimizer; its result is stepped once per local step."""
    training_step: Callable[..., Tensor] | None = None
    """`training_step(model, batch) -> loss`, in place of `loss`."""
    preprocess: Callable[[Any], Any] | None = None
    """Applied to a batch's features in training, validation and `transform`."""
    augment: Callable[[Any], Any] | None = None
    """Applied to a batch's features in training only, after `preprocess`."""
    collate: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None = None
    """For ragged columns: list of 1-d tensors -> tensor."""
    metrics: Mapping[str, Any] | None = None
    """Name -> `f(output, label)` or a torchmetrics Metric; scored on the validation rows."""


def inner_optimizer(program: Program, parameters: Sequence[Tensor]) -> tuple[torch.optim.Optimizer, Any]:
    """A fresh optimizer over `parameters`, and its learning-rate scheduler or None.

    Raises:
        ConfigError: the factory returns something else.
    """
    optimizer = program.optimizer(list(parameters))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer returned {type(optimizer).__name__}; give a callable that takes the parameters and returns "
            "a torch.optim.Optimizer, such as partial(torch.optim.AdamW, lr=1e-3)."
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(
            f"optimizer={type(optimizer).__name__}: its step() needs a closure that evaluates the loss anew, and a local step "
            "sees its batch once. Use another optimizer, or algorithm=lbfgs() for L-BFGS over all rows."
        )
    if program.lr_scheduler is None:
        return optimizer, None
    scheduler = program.lr_scheduler(optimizer)
    optimizer._opt_called = True  # type: ignore[attr-defined]  # the clock may run ahead of this replica
    return optimizer, scheduler


def other_modules(program: Program) -> dict[str, nn.Module]:
    """Modules that work on the model's device without being part of the model, by their place in the program.

    Examples are a loss with class weights, a `preprocess` with statistics, a metric; also as parts of a partial, or as
    owners of a method. `collate` works on the CPU.
    """
    own = {id(module) for module in program.model.modules()}
    parts = {name: getattr(program, name) for name in ("loss", "training_step", "preprocess", "augment")}
    parts |= {f"metrics[{name!r}]": metric for name, metric in (program.metrics or {}).items()}
    found: dict[str, nn.Module] = {}
    while parts:
        name, part = parts.popitem()
        if isinstance(part, functools.partial):
            parts |= {f"{name}.func": part.func, **{f"{name}.args[{i}]": arg for i, arg in enumerate(part.args)}}
            parts |= {f"{name}[{key!r}]": value for key, value in part.keywords.items()}
        elif isinstance(part, MethodType):
            parts[f"{name}.__self__"] = part.__self__
        elif isinstance(part, nn.Module) and id(part) not in own:
            found[name] = part
    return found


def check_trained(program: Program) -> None:
    """Refuse a loss with trainable parameters of its own: only the model's are trained, averaged and returned.

    Raises:
        ConfigError: with the parameter's name.
    """
    own = {id(parameter) for parameter in program.model.parameters()}
    for where, module in other_modules(program).items():
        if not where.startswith(("loss", "training_step")):
            continue
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in own:
                raise ConfigError(
                    f"{where} ({type(module).__name__}) has the trainable parameter {name!r}, which would not be trained: "
                    "only the model's parameters are. Make it part of the model and use training_step(model, batch), or "
                    "freeze it with requires_grad_(False)."
                )


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


def _parametrized(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


def _set_parametrized(module: nn.Module, state: dict[str, Any]) -> None:
    module.__dict__.update(state)
    parametrize._inject_new_class(module)
    for name in cast("nn.ModuleDict", module.parametrizations):
        parametrize._inject_property(module, name)


class _Unpickler(pickle.Unpickler):
    """Gives each name one empty tensor of the recorded shape."""

    def __init__(self, file: io.BytesIO, table: Mapping[str, tuple[str, tuple[int, ...], bool, bool]]) -> None:
        super().__init__(file)
        self._table = table
        self._made: dict[str, Tensor] = {}

    def persistent_load(self, pid: str) -> Tensor:
        if pid not in self._made:
            dtype, shape, is_parameter, requires_grad = self._table[pid]
            tensor = torch.zeros(shape, dtype=getattr(torch, dtype))
            self._made[pid] = nn.Parameter(tensor, requires_grad=requires_grad) if is_parameter else tensor
        return self._made[pid]


def pack_program(program: Program) -> bytes:
    """Serialize `program` for the task closure.

    Raises:
        PreflightError: a part cannot be pickled; the message names the attribute.
        ConfigError: a lazy parameter has no shape yet.
    """
    parts = check_picklable(program)
    named = dict(named_tensors(program.model))
    for name, tensor in named.items():
        if is_lazy(tensor):
            raise ConfigError(
                f"parameter {name!r} is lazy and has no shape yet: run one batch through the module first."
            )
    table = {
        name: (
            str(t.dtype).removeprefix("torch."),
            tuple(t.shape),
            isinstance(t, nn.Parameter),
            t.requires_grad,
        )
        for name, t in named.items()
    }
    return bytes(cloudpickle.dumps((table, parts, isinstance(program.model, KerasNetwork))))


def check_picklable(program: Program) -> bytes:
    """Pickle everything but the module's tensors, which need not have a shape yet.

    Raises:
        PreflightError: a part cannot be pickled; the message names the attribute.
    """
    names = {id(tensor): name for name, tensor in named_tensors(program.model)}
    # One pickle for all: a training_step that is a method of the model must meet the same model on the replica.
    parts = {field.name: getattr(program, field.name) for field in fields(program)}
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, names).dump(parts)
    except Exception as error:
        where = next((w for name, value in parts.items() if (w := _culprit(value, name, names))), "the program")
        raise PreflightError(
            f"{where} cannot be pickled and so cannot be sent to the executors: {type(error).__name__}: {error}. "
            "Open files, locks, sockets and sessions must be made inside the model (lazily, on the executor), "
            "not kept as attributes."
        ) from error
    return buffer.getvalue()


def unpack_program(data: bytes) -> Program:
    """Rebuild a program on a replica; its module's tensors are zeros until they are loaded."""
    table, parts, keras = pickle.loads(data)  # noqa: S301 (the user's own program, from Spark's task closure)
    if keras:  # before one of the user's modules imports it
        choose_keras_backend("torch")
    return Program(**_Unpickler(io.BytesIO(parts), table).load())


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


def prepared(batch: Batch, program: Program, *, augment: bool) -> Batch:
    """Apply `preprocess`, and in training `augment`, to a batch's features."""
    features = batch.features
    if program.preprocess is not None:
        features = program.preprocess(features)
    if augment and program.augment is not None:
        features = program.augment(features)
    return batch if features is batch.features else replace(batch, features=features)
