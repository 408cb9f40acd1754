"""The driver's own module: what a factory makes, or a copy of the one that was given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparkdeep.errors import ConfigError, SparkdeepError
from sparkdeep.interop import adopt
from sparkdeep.program import Program, check_picklable

__all__ = ["build_model", "copy_of"]


def build_model(factory: nn.Module | Callable[..., Any], arguments: Mapping[str, Any], seed: int) -> nn.Module:
    """A module of our own on the CPU: a copy of the given one, or what the factory makes after `manual_seed(seed)`.

    Raises:
        ConfigError: the factory gives no module, or the module holds what cannot be copied and sent.
    """
    factory = adopt(factory)
    if isinstance(factory, nn.Module):
        if arguments:
            raise ConfigError(
                f"model_args={dict(arguments)!r} with a model that is built already; give the class instead."
            )
        try:
            return copy_of(factory).cpu()
        except SparkdeepError:
            raise
        except Exception as error:
            check_picklable(Program(model=factory, loss=None, optimizer=torch.optim.SGD))  # names the attribute
            raise ConfigError(
                f"the model cannot be copied: {type(error).__name__}: {error}. Give its class, or a function that builds "
                "it, as model=."
            ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = adopt(factory(**arguments))
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"model={factory!r} returned {type(module).__name__}; it must be an nn.Module, a class of one, a callable that "
            "returns one, or 'package.module:function'."
        )
    return module.cpu()


def copy_of(module: nn.Module) -> nn.Module:
    """A deep copy, also where `copy.deepcopy` alone refuses.

    It refuses lazy buffers, and tensors that were computed from parameters: `torch.nn.utils.weight_norm` keeps one as
    an attribute and computes it anew in every forward pass.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for tensor in [*part._parameters.values(), *part._buffers.values(), *vars(part).values()]:
            if not isinstance(tensor, Tensor):
                continue
            if is_lazy(tensor):
                memo[id(tensor)] = _lazy_copy(tensor)
            elif not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(module, memo)


def _lazy_copy(tensor: Any) -> Any:
    made = type(tensor)(requires_grad=tensor.requires_grad, device=tensor.device, dtype=tensor.dtype)
    made.__dict__.update(tensor.__dict__)
    return made
