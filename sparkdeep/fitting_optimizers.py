"""Whether the user's optimizer can do what the settings ask of it; tried on the driver, before anything is trained."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD, Optimizer

from sparkdeep.config import LocalSettings
from sparkdeep.drift import Scaffold
from sparkdeep.errors import ConfigError
from sparkdeep.program import Program, inner_optimizer

__all__ = ["check_inner_optimizer"]


def check_inner_optimizer(program: Program, local: LocalSettings) -> None:
    """Refuse an optimizer of the replicas that does not fit.

    Args:
        program: of the fit; its parameters are not touched.
        local: settings of the replicas.

    Raises:
        ConfigError: with what to give instead.
    """
    if not isinstance(local.drift_correction, Scaffold):
        return
    parameters = [nn.Parameter(p.detach()) for p in program.model.parameters() if p.requires_grad]
    optimizer, _ = inner_optimizer(program, parameters)
    if (odd := _unlike_plain_sgd(optimizer)) is not None:
        raise ConfigError(
            f"drift_correction=Scaffold() with the optimizer {odd}: a control variate is a mean gradient, which is read off what "
            "plain SGD moved. Give partial(torch.optim.SGD, lr=...) without momentum, or use FedProx(mu)."
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
