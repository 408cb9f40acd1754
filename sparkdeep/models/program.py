"""The user's objects that a replica runs: what they are, and what is asked of them."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn

from sparkdeep.data.batches import Batch
from sparkdeep.errors import ConfigError
from sparkdeep.tensors.pooling import Rule

__all__ = [
    "NO_STEPS",
    "Program",
    "inner_optimizer",
    "other_modules",
    "parts_inside",
    "prepared",
]


NO_STEPS: Final = functools.partial(torch.optim.SGD, lr=0.0)
"""The optimizer of replicas that take no steps (`work="gradient"`); the driver has the outer one, and the schedule."""


_DEPTH: Final = 5
"""How deep a module may lie in closures, attributes and containers of the user's callables."""
_MOST_ITEMS: Final = 1000
"""Items of a container that are looked at: a vocabulary holds no modules, and a million words."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """All of the user's objects that a replica runs."""

    model: nn.Module
    """The module; on the driver with its values, on a replica with empty tensors until the first message."""
    loss: Callable[..., Tensor] | None
    """`loss(output, label)`, or None with `training_step`."""
    optimizer: Callable[..., torch.optim.Optimizer]
    """Called with the trainable parameters, or what its argument is named after: `named_parameters` or `model`."""
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
    buffers: Mapping[str, Rule] | None = None
    """Pattern of names -> how state of that name becomes one: of buffers, extra state, attributes of modules."""
    metrics: Mapping[str, Any] | None = None
    """Name -> `f(output, label)` or a torchmetrics Metric; scored on the validation rows."""


def inner_optimizer(program: Program) -> tuple[torch.optim.Optimizer, Any]:
    """A fresh optimizer over the model's trainable parameters, and its learning-rate scheduler or None.

    Raises:
        ConfigError: the factory returns something else, or an optimizer of parameters that are not the model's.
    """
    optimizer = program.optimizer(_wanted(program))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer returned {type(optimizer).__name__}; give a callable that takes the parameters and returns "
            "a torch.optim.Optimizer, such as partial(torch.optim.AdamW, lr=1e-3)."
        )
    own = {id(parameter) for parameter in program.model.parameters()}
    odd = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    if odd:
        raise ConfigError(
            f"optimizer= returned {type(optimizer).__name__} of {len(odd)} parameters that are not the model's (shapes "
            f"{str(odd[:3])[1:-1]}): they would be trained in its place. Take them from the argument: def optimizer(parameters), "
            "def optimizer(named_parameters) for (name, parameter) pairs, or def optimizer(model)."
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


def _wanted(program: Program) -> Any:
    """What the optimizer's factory is given: by the name of its first argument the model, named parameters, or parameters."""
    trainable = [(name, parameter) for name, parameter in program.model.named_parameters() if parameter.requires_grad]
    try:
        first = next(iter(inspect.signature(program.optimizer).parameters.values()), None)
    except (TypeError, ValueError):  # a callable without a signature names no argument
        first = None
    name = "" if first is None else first.name
    if name in {"model", "module"}:
        return program.model
    return trainable if name in {"named_parameters", "named_params"} else [parameter for _, parameter in trainable]


def other_modules(program: Program, only: str = "") -> dict[str, nn.Module]:
    """Modules that work on the model's device without being part of the model, by their place in the program.

    Examples are a loss with class weights, a `preprocess` with statistics, a metric; also in partials, closures, attributes, lists
    and dicts, or as owners of a method. `collate` works on the CPU.

    Args:
        program: the user's objects.
        only: one place, such as "preprocess"; "": all.
    """
    own = {id(module) for module in program.model.modules()}
    parts = {name: getattr(program, name) for name in ("loss", "training_step", "preprocess", "augment")}
    parts |= {f"metrics[{name!r}]": metric for name, metric in (program.metrics or {}).items()}
    found: dict[str, nn.Module] = {}
    left = deque((name, part, 0) for name, part in parts.items() if name.startswith(only))
    while left:
        name, part, depth = left.popleft()
        if isinstance(part, nn.Module):
            if id(part) not in own:
                own.add(id(part))
                found[name] = part
        elif depth < _DEPTH and id(part) not in own:
            own.add(id(part))
            left += [(f"{name}{at}", inner, depth + 1) for at, inner in parts_inside(part)]
    return found


def parts_inside(part: Any) -> list[tuple[str, Any]]:
    """What an object of the user's holds, with its place in it; of long containers, the beginning."""
    if isinstance(part, functools.partial):
        named = [(f"[{key!r}]", value) for key, value in part.keywords.items()]
        return [(".func", part.func), *((f".args[{i}]", arg) for i, arg in enumerate(part.args)), *named]
    if isinstance(part, MethodType):
        return [(".__self__", part.__self__)]
    if isinstance(part, FunctionType):
        cells = zip(part.__code__.co_freevars, part.__closure__ or (), strict=True)
        return [(f".{name}", cell.cell_contents) for name, cell in cells if cell != CellType()]
    if isinstance(part, Mapping):
        return [(f"[{key!r}]", value) for key, value in islice(part.items(), _MOST_ITEMS)]
    if isinstance(part, list | tuple):
        return [(f"[{i}]", value) for i, value in enumerate(part[:_MOST_ITEMS])]
    ours = isinstance(part, type | Tensor | ModuleType) or not hasattr(part, "__dict__")
    return [] if ours else [(f".{name}", value) for name, value in vars(part).items()]


def prepared(batch: Batch, program: Program, *, augment: bool) -> Batch:
    """Apply `preprocess`, and in training `augment`, to a batch's features."""
    features = batch.features
    if program.preprocess is not None:
        features = program.preprocess(features)
    if augment and program.augment is not None:
        features = program.augment(features)
    return batch if features is batch.features else replace(batch, features=features)
