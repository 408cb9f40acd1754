"""Whether the user's optimizer can do what the settings ask of it; tried on the driver, before anything is trained."""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer

from sparkdeep.config import LocalSettings, RunSettings
from sparkdeep.drift import Scaffold
from sparkdeep.errors import ConfigError
from sparkdeep.outer_optimizers import DelayedNesterov, Downpour
from sparkdeep.program import Program, inner_optimizer

__all__ = ["check_inner_optimizer"]

_LOG = logging.getLogger("sparkdeep")


def check_inner_optimizer(program: Program, local: LocalSettings, run: RunSettings, outer: Any) -> None:
    """Refuse an optimizer of the replicas that does not fit, or say aloud what it means.

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
    if not isinstance(local.drift_correction, Scaffold) and made is not Downpour:
        return
    parameters = [nn.Parameter(p.detach()) for p in program.model.parameters() if p.requires_grad]
    optimizer, _ = inner_optimizer(program, parameters)
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
        if group["lr"] != optimizer.param_groups[0]["lr"]:
            return "SGD with several learning rates"
    return None
