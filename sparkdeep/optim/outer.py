"""The outer step, on the driver: assign the mean, or drive any torch optimizer with minus the mean delta; some that torch has not.

This is the one file that negates: `grad = start - mean`, the pseudo-gradient of Reddi et al. (2021, "Adaptive
Federated Optimization") and of DiLoCo (Douillard et al., 2023), so that a minimizer moves towards the mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor
from torch.optim import Adagrad, Optimizer

from sparkdeep.checks import at_least, not_negative, positive
from sparkdeep.errors import ConfigError
from sparkdeep.protocol.orders import RoundResult
from sparkdeep.tensors.encoding import chunks_of
from sparkdeep.tensors.parameters import Layout

__all__ = [
    "Assign",
    "DelayedNesterov",
    "Downpour",
    "FedAdam",
    "FedYogi",
    "OuterOptimizer",
    "SlowMo",
    "TorchOuter",
    "driven",
    "has_modes",
]

# From so many elements on, copying is worth torch's several threads; below it, they would spin beside the replicas of this
# host, waiting for more, for longer than they had worked.
_MANY: Final = 1 << 25


class OuterOptimizer(ABC):
    """Moves the global parameters once a round."""

    stopped = ""
    """Why no further step helps, where it can tell; else ""."""
    uses_rate = False
    """Whether it needs the replicas' learning rates of each round."""
    inner_lrs: Sequence[float] = ()
    """Of every parameter, the mean of its rates in the round's steps; set before the round's closure returns."""

    @abstractmethod
    def step(self, parameters: Tensor, round_: Callable[[], RoundResult]) -> None:
        """Run one round and move `parameters`, shape (numel,), in place.

        If the round raises, neither the parameters nor the optimizer's state have changed.
        """

    @abstractmethod
    def state_dict(self) -> Mapping[str, Any]:
        """What must be restored, beside the parameters, for the run to go on exactly."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""


@final
class Assign(OuterOptimizer):
    """Plain parameter averaging: the mean itself is written, bit for bit (delta arithmetic would round)."""

    def step(self, parameters: Tensor, round_: Callable[[], RoundResult]) -> None:
        """Write the round's mean into `parameters`, rounded once to their dtype."""
        mean = round_().mean
        if parameters.numel() < _MANY:
            np.copyto(parameters.detach().numpy(), mean.numpy(), casting="same_kind")
        else:
            parameters.copy_(mean)

    def state_dict(self) -> Mapping[str, Any]:
        """Nothing: averaging has no memory."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept the empty state only."""
        if state:
            raise ValueError(f"plain averaging has no state, got keys {sorted(state)}")


def has_modes(optimizer: Optimizer) -> bool:
    """Whether it has `train()` and `eval()`, as schedule-free ones have."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def driven(factory: Callable[..., Optimizer], parameters: Tensor, gradient: Tensor, layout: Layout) -> Optimizer:
    """An optimizer of the global parameters, seen in their shapes, whose `.grad` are views of `gradient`.

    Raises:
        ConfigError: the factory gives something else.
    """
    leaves = [view.requires_grad_() for view in layout.views(parameters)]
    for leaf, grad in zip(leaves, layout.views(gradient), strict=True):
        leaf.grad = grad
    optimizer = factory(leaves)
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"outer_optimizer returned {type(optimizer).__name__}; it must be a callable that takes parameters "
            "and returns a torch.optim.Optimizer, such as partial(torch.optim.SGD, lr=0.7, momentum=0.9)."
        )
    if has_modes(optimizer):
        raise ConfigError(
            f"outer_optimizer={type(optimizer).__name__} takes gradients at other parameters than those that it gives, and replicas start "
            "each round from the latter. Use it as optimizer=, or another outer optimizer."
        )
    return optimizer


class TorchOuter(OuterOptimizer):
    """Drives a `torch.optim` optimizer over the global parameters, seen in their shapes.

    Args:
        factory: called with the list of parameters; e.g. `partial(torch.optim.SGD, lr=0.7, momentum=0.9,
            nesterov=True)` for DiLoCo.
        parameters: the flat vector the optimizer moves, shape (numel,); the optimizer holds views of it.
        layout: where each parameter lies in it.
    """

    def __init__(self, factory: Callable[..., Optimizer], parameters: Tensor, layout: Layout) -> None:
        self._parameters = parameters
        self._grad = torch.zeros_like(parameters)
        self._optimizer = optimizer = driven(factory, parameters, self._grad, layout)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "outer_optimizer=LBFGS with work='local': its line search needs losses and gradients, which rounds of local steps do "
                "not tell. Use algorithm=lbfgs(), or work='gradient' with sync_every='epoch'."
            )
        self.uses_rate = hasattr(optimizer, "inner_lr")
        own = {p.storage_offset(): p for group in optimizer.param_groups for p in group["params"]}
        self._leaves = [own.get(entry.offset) for entry in layout.entries]

    def tell(self, rates: Sequence[float]) -> None:
        """Give the optimizer the replicas' learning rates, one a parameter of the layout, as `inner_lr` and `inner_lrs`."""
        optimizer: Any = self._optimizer
        optimizer.inner_lr = max(rates)
        if hasattr(optimizer, "inner_lrs"):
            known = zip(self._leaves, rates, strict=True)
            optimizer.inner_lrs = {leaf: rate for leaf, rate in known if leaf is not None}

    def step(self, parameters: Tensor, round_: Callable[[], RoundResult]) -> None:
        """One `optimizer.step(closure)`; the closure runs the round and sets `.grad = start - mean`."""
        assert parameters is self._parameters, "the outer optimizer holds views of another vector"

        def closure() -> float:
            result = round_()
            with torch.no_grad():
                own = parameters.detach()
                for start, stop in chunks_of(own.numel()):  # in float64, without a copy of all of it
                    self._grad[start:stop] = own[start:stop].to(torch.float64) - result.mean[start:stop]
            if self.uses_rate:  # known once the round is done
                self.tell(self.inner_lrs)
            return result.loss

        self._optimizer.step(closure)

    def state_dict(self) -> Mapping[str, Any]:
        """The optimizer's own state dict."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the optimizer's state dict."""
        self._optimizer.load_state_dict(dict(state))


def _moved(group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    return ((p, p.grad) for p in group["params"] if p.grad is not None)


class _OwnOptimizer(Optimizer, ABC):
    """What those that torch has not have in common: the closure runs the round, and then every parameter takes its step."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Run the round by `closure`, and move the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter, gradient in _moved(group):
                    self._move(parameter, gradient, group, self.state[parameter])
        return loss

    @abstractmethod
    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        """Take one parameter's step."""


class FedAdam(_OwnOptimizer):
    """FedAdam (Reddi et al., 2021): Adam on the mean change, without bias correction.

    `m = b1 m + (1 - b1) d`, `v = b2 v + (1 - b2) d^2`, `x += lr m / (sqrt(v) + tau)`, with `d` the mean change and `v` begun at
    `tau^2`. `torch.optim.Adam` corrects for the bias of m and v, and is another method of the same family.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.1, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3
    ) -> None:
        not_negative("lr", lr)
        positive("tau", tau)
        for i, beta in enumerate(betas):
            not_negative(f"betas[{i}]", beta, below=1.0)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "tau": tau})

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        b1, b2 = group["betas"]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.full_like(parameter, group["tau"] ** 2)
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(b1).add_(gradient, alpha=1 - b1)
        self._second(square, gradient, b2)
        parameter.addcdiv_(mean, square.sqrt().add_(group["tau"]), value=-group["lr"])

    def _second(self, square: Tensor, gradient: Tensor, beta: float) -> None:
        square.mul_(beta).addcmul_(gradient, gradient, value=1 - beta)


class FedYogi(FedAdam):
    """FedYogi (Reddi et al., 2021): as FedAdam, but `v -= (1 - b2) d^2 sign(v - d^2)`, which forgets slowly."""

    def _second(self, square: Tensor, gradient: Tensor, beta: float) -> None:
        new = gradient.square()
        square.addcmul_(new, torch.sign(square - new), value=-(1 - beta))


class SlowMo(_OwnOptimizer):
    """SlowMo (Wang et al., 2020): `u = momentum u + (start - mean) / rate`, `x = start - lr rate u`.

    `rate` is the mean of the replicas' learning rates in the round, each parameter's own, which the fit tells: with a constant one it is SGD
    with momentum, with one that decays it is not, as `u` is kept in units of gradients.
    """

    inner_lr: float = 1.0
    """The replicas' learning rate, the highest of all parameters: the fit sets it in every outer optimizer that has this attribute."""
    inner_lrs: Mapping[Tensor, float] = MappingProxyType({})
    """Likewise, each parameter's own, the mean over the round's steps."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1.0, momentum: float = 0.5) -> None:
        not_negative("lr", lr)
        not_negative("momentum", momentum, below=1.0)
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        rate = self.inner_lrs.get(parameter, self.inner_lr)
        if not rate > 0:  # where every step's rate is 0 replicas have not moved
            return
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        slow = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient, alpha=1 / rate)
        parameter.add_(slow, alpha=-group["lr"] * rate)


class DelayedNesterov(_OwnOptimizer):
    """Delayed Nesterov (Liu et al., 2024, "Asynchronous Local-SGD training"): momentum moves at every `delay`-th push.

    Each push: `x -= lr g / delay`. At every `delay`-th: `m = momentum m + mean of the last delay g`, `x -= lr momentum m`. At these
    milestones it is Nesterov's method on the means.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 0.7, momentum: float = 0.9, delay: int = 4) -> None:
        not_negative("lr", lr)
        not_negative("momentum", momentum, below=1.0)
        at_least("delay", delay, 1)
        super().__init__(params, {"lr": lr, "momentum": momentum, "delay": delay})

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        lr, beta, delay = group["lr"], group["momentum"], group["delay"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
            state["waiting"] = torch.zeros_like(parameter)
            state["pushes"] = 0
        state["waiting"].add_(gradient, alpha=1 / delay)
        state["pushes"] += 1
        parameter.add_(gradient, alpha=-lr / delay)
        if state["pushes"] % delay == 0:
            momentum = state["momentum_buffer"].mul_(beta).add_(state["waiting"])
            parameter.add_(momentum, alpha=-lr * beta)
            state["waiting"].zero_()


class Downpour(Adagrad):
    """Downpour's server (Dean et al., 2012): Adagrad on the gradients that a replica has summed up since its last push.

    What a replica changed, divided by its learning rate, is that sum for plain SGD. `lr` is some ten times that of SGD.
    """

    inner_lr: float = 1.0
    """As of `SlowMo`."""
    inner_lrs: Mapping[Tensor, float] = MappingProxyType({})
    """Likewise."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.1, eps: float = 1e-10) -> None:
        super().__init__(params, lr=lr, eps=eps)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Run the round by `closure`, and move the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter, gradient in _moved(group):
                rate = self.inner_lrs.get(parameter, self.inner_lr)
                if rate > 0:  # else no replica has moved it
                    gradient.div_(rate)
        if self.inner_lr > 0:
            super().step()
        return loss
