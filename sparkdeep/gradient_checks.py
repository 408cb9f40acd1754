"""What gradient rounds cannot be meant with: refused before anything runs, or said aloud."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from sparkdeep.config import RunSettings
from sparkdeep.errors import ConfigError
from sparkdeep.program import Program

__all__ = ["check_factory", "check_model"]

_LOG = logging.getLogger("sparkdeep")


def check_factory(factory: Any, run: RunSettings) -> None:
    """Refuse an outer optimizer that does not fit, as far as that shows before it is made.

    Raises:
        ConfigError: with the remedy.
    """
    if run.work == "gradient" and factory is None:
        raise ConfigError(
            "work='gradient' without outer_optimizer=: replicas tell gradients, and nothing would move the parameters. Give one, "
            "such as outer_optimizer=partial(torch.optim.Adam, lr=1e-3), or algorithm=lbfgs()."
        )
    made = factory
    while isinstance(made, functools.partial):
        made = made.func
    if isinstance(made, type) and issubclass(made, torch.optim.LBFGS):
        _check_line_search(run)


def _check_line_search(run: RunSettings) -> None:
    if run.work == "local":
        raise ConfigError(
            "outer_optimizer=LBFGS with work='local': its line search asks for the loss and the gradient at parameters of its "
            "choice, which rounds of local steps do not tell. Use algorithm=lbfgs(), or work='gradient' with sync_every='epoch'."
        )
    if run.sync_every != "epoch":
        raise ConfigError(
            f"outer_optimizer=LBFGS with sync_every={run.sync_every!r}: a line search compares losses, and those of other batches "
            "are another function. Use sync_every='epoch'."
        )


def check_model(program: Program, run: RunSettings, *, line_search: bool) -> None:
    """Refuse batches that change under a line search; warn of what gradients of all rows leave out.

    Raises:
        ConfigError: with the remedy.
    """
    if line_search:
        _check_line_search(run)
    if line_search and run.divergence_factor is not None:
        raise ConfigError(
            f"divergence_factor={run.divergence_factor!r} with a line search, which takes no step that raises the loss: leave it out."
        )
    if run.gradient != "all":
        return
    for name, module in program.model.named_modules():
        what = _left_out(module)
        if what:
            _LOG.warning(
                "%s (%s): with gradients of all rows the model is in eval mode, as the loss must depend on the parameters alone: "
                "%s. Leave it out of the model, or train by local steps.",
                name or "the model",
                type(module).__name__,
                what,
            )
    if program.augment is not None:
        _LOG.warning(
            "augment=: with gradients of all rows nothing is augmented, as the loss must depend on the parameters alone."
        )


def _left_out(module: nn.Module) -> str:
    """What a module does in train mode only."""
    rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
    if isinstance(module, _DropoutNd | nn.RNNBase | nn.MultiheadAttention) and isinstance(rate, float) and rate > 0:
        return "nothing is dropped out"
    if isinstance(module, _NormBase) and module.track_running_stats:
        return "its running statistics are used as they are, and not updated"
    return ""
