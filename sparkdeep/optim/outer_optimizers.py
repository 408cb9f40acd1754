"""Outer optimizers that torch has not, as torch optimizers: `grad` is the round's start minus its mean (`outer.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adagrad, Optimizer

from sparkdeep.checks import at_least, not_negative, positive

__all__ = ["DelayedNesterov", "Downpour", "FedAdam", "FedYogi", "SlowMo"]


def _moved(group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    return ((p, p.grad) for p in group["params"] if p.grad is not None)


class _Outer(Optimizer, ABC):
    """What they have in common: the closure runs the round, and then every parameter takes its step."""

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


class FedAdam(_Outer):
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


class SlowMo(_Outer):
    """SlowMo (Wang et al., 2020): `u = momentum u + (start - mean) / rate`, `x = start - lr rate u`.

    `rate` is the mean of the replicas' learning rates in the round, which the fit tells: with a constant one it is SGD with momentum, with one
    that decays it is not, as `u` is kept in units of gradients.
    """

    inner_lr: float = 1.0
    """The mean of the replicas' learning rates in the round: the loop sets it, in every outer optimizer that has this attribute."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1.0, momentum: float = 0.5) -> None:
        not_negative("lr", lr)
        not_negative("momentum", momentum, below=1.0)
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        rate = self.inner_lr
        if not rate > 0:  # where every step's rate is 0 replicas have not moved
            return
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        slow = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient, alpha=1 / rate)
        parameter.add_(slow, alpha=-group["lr"] * rate)


class DelayedNesterov(_Outer):
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

    def __init__(self, params: Iterable[Tensor], lr: float = 0.1, eps: float = 1e-10) -> None:
        super().__init__(params, lr=lr, eps=eps)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Run the round by `closure`, and move the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.inner_lr > 0:
            for group in self.param_groups:
                for _, gradient in _moved(group):
                    gradient.div_(self.inner_lr)
            super().step()
        return loss
