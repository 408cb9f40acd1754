"""Power-iteration vectors of spectral norms, found again for averaged weights: those of replicas belong to weights of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from sparkdeep.tensors.parameters import Layout

__all__ = ["has_spectral_norms", "old_spectral_norm", "renormalized"]

_MOST_ITERATIONS: Final = 100
_ENOUGH: Final = 1e-6
"""Relative change of the norm in an iteration."""


def old_spectral_norm(module: nn.Module) -> list[Any]:
    """The hooks of `torch.nn.utils.spectral_norm` on a module."""
    hooks = module._forward_pre_hooks.values()
    return [
        h for h in hooks if (type(h).__module__, type(h).__name__) == ("torch.nn.utils.spectral_norm", "SpectralNorm")
    ]


def _norms(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, Any, str]]:
    """(name of u, name of v, module that has the weight, what reshapes it, name of the weight in it)."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for hook in old_spectral_norm(module):
            yield f"{prefix}{hook.name}_u", f"{prefix}{hook.name}_v", module, hook, f"{hook.name}_orig"
        if not parametrize.is_parametrized(module):
            continue
        for weight, chain in module.parametrizations.items():
            for place, one in enumerate(chain):
                if isinstance(one, _SpectralNorm) and hasattr(one, "_u"):
                    at = f"{prefix}parametrizations.{weight}.{place}"
                    yield f"{at}._u", f"{at}._v", chain, one, str(place)


def has_spectral_norms(model: nn.Module) -> bool:
    """Whether a weight of the model is divided by its largest singular value, as power iterations estimate it."""
    return next(_norms(model), None) is not None


@torch.no_grad()
def renormalized(
    model: nn.Module, layout: Layout, parameters: Tensor, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state with the singular vectors of the weights that `parameters` hold.

    Args:
        model: the driver's own; takes over the parameters.
        layout: of the model.
        parameters: (numel,).
        state: with vectors to begin from.
    """
    layout.write(model, parameters)
    found = dict(state)
    for u_name, v_name, module, norm, weight in _norms(model):
        if u_name not in state or v_name not in state:
            continue
        if isinstance(norm, _SpectralNorm):
            value = cast("Tensor", module.original)
            for before in list(module.children())[: int(weight)]:
                value = before(value)
            matrix = norm._reshape_weight_to_matrix(value)
        else:
            matrix = norm.reshape_weight_to_matrix(getattr(module, weight))
        found[u_name], found[v_name] = _vectors(matrix, state[u_name].to(matrix.dtype), norm.eps)
    return found


def _vectors(matrix: Tensor, u: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The singular vectors of the largest singular value, by power iterations from `u`."""
    before = -1.0
    for _ in range(_MOST_ITERATIONS):
        v = F.normalize(torch.mv(matrix.t(), u), dim=0, eps=eps)
        towards = torch.mv(matrix, v)
        norm = float(towards.norm())
        u = F.normalize(towards, dim=0, eps=eps)
        if abs(norm - before) <= _ENOUGH * norm:
            break
        before = norm
    return u, F.normalize(torch.mv(matrix.t(), u), dim=0, eps=eps)
