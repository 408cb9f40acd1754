"""Whether the user's optimizer can do what the settings ask of it; tried on the driver, before anything is trained."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import SGD, Optimizer

from sparkdeep.errors import ConfigError
from sparkdeep.models.program import Program, inner_optimizer
from sparkdeep.optim.drift import Scaffold
from sparkdeep.optim.outer import DelayedNesterov, Downpour, has_modes
from sparkdeep.rounds.inner_rates import InnerRates
from sparkdeep.settings.run import LocalSettings, RunSettings

__all__ = ["check_factory", "check_inner_optimizer", "check_model", "warn_of_dense_rounds"]

_LOG = logging.getLogger("sparkdeep")


def check_inner_optimizer(program: Program, local: LocalSettings, run: RunSettings, outer: Any) -> None:
    """Refuse an optimizer that does not fit the replicas' settings, or warn of what it means.

    Args:
        program: of the fit; its parameters are not touched.
        local: settings of the replicas.
        run: settings of the driver.
        outer: the factory of the outer optimizer, or None.

    Raises:
        ConfigError: with what to give instead.
    """
    made = outer
    while isinstance(made, functools.partial):
        made = made.func
    if made is DelayedNesterov and run.asynchronous is not None:
        _check_delay(outer, run)
    if not isinstance(local.drift_correction, Scaffold) and made is not Downpour and run.asynchronous is None:
        return
    optimizer, _ = inner_optimizer(program)
    if has_modes(optimizer) and run.asynchronous is not None:
        raise ConfigError(
            f"asynchronous= with the optimizer {type(optimizer).__name__}, which trains at other parameters than it gives: what is pushed in "
            "the middle of a round would be neither. Use plain SGD, or synchronous rounds."
        )
    odd = _unlike_plain_sgd(optimizer)
    if odd is not None and made is Downpour:
        _LOG.warning(
            "outer_optimizer=Downpour with the optimizer %s: what it changed, divided by its rate, is no sum of gradients, and Adagrad's "
            "lr means something else. Give partial(torch.optim.SGD, lr=...) without momentum, or tune lr anew.",
            odd,
        )
    if odd is not None and isinstance(local.drift_correction, Scaffold):
        raise ConfigError(
            f"drift_correction=Scaffold() with the optimizer {odd}: a control variate is a mean gradient, which is read off what "
            "plain SGD moved. Give partial(torch.optim.SGD, lr=...) without momentum, or use FedProx(mu)."
        )


def _check_delay(outer: Any, run: RunSettings) -> None:
    delay = outer.keywords.get("delay", 4) if isinstance(outer, functools.partial) else 4
    if delay != run.num_workers:
        _LOG.warning(
            "DelayedNesterov(delay=%s) with num_workers=%d: a push moves by lr / delay, which is a mean over replicas where delay is their "
            "number. Give delay=%d, or tune lr anew.",
            delay,
            run.num_workers,
            run.num_workers,
        )


def _unlike_plain_sgd(optimizer: Optimizer) -> str | None:
    if not isinstance(optimizer, SGD):
        return type(optimizer).__name__
    for group in optimizer.param_groups:
        for name in ("momentum", "weight_decay", "maximize"):
            if group[name]:
                return f"SGD({name}={group[name]})"
    return None


def warn_of_dense_rounds(rates: InnerRates) -> None:
    """Warn that rounds which are to grow as the learning rate falls never will."""
    if rates.constant:
        _LOG.warning(
            "schedule=PostLocal() with a constant learning rate: it waits for the first fall of the rate, and every step is averaged "
            "until then. Give lr_scheduler=, or PostLocal(switch_step=n)."
        )


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
    """What a module does only in training mode."""
    rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
    if isinstance(module, _DropoutNd | nn.RNNBase | nn.MultiheadAttention) and isinstance(rate, float) and rate > 0:
        return "nothing is dropped out"
    if isinstance(module, _NormBase) and module.track_running_stats:
        return "its running statistics are used as they are, and not updated"
    return ""
