"""The outer step, on the driver: assign the mean, or drive any torch optimizer with minus the mean delta.

This is the one file that negates: `grad = start - mean`, the pseudo-gradient of Reddi et al. (2021, "Adaptive
Federated Optimization") and of DiLoCo (Douillard et al., 2023), so that a minimizer moves towards the mean.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from sparkdeep.errors import ConfigError
from sparkdeep.protocol.orders import RoundResult
from sparkdeep.tensors.encoding import chunks_of
from sparkdeep.tensors.parameters import Layout

__all__ = ["Assign", "OnArrival", "OuterOptimizer", "TorchOuter", "driven"]

# From so many elements on, copying is worth torch's several threads; below it, they would spin beside the replicas of this
# host, waiting for more, for longer than they had worked.
_MANY: Final = 1 << 25


class OuterOptimizer(ABC):
    """Moves the global parameters once a round."""

    stopped = ""
    """Why no further step helps, where it can tell; else ""."""
    uses_rate = False
    """Whether it needs the replicas' learning rate of each round."""
    inner_lr = 1.0
    """The mean of those of its steps, set before the round's closure returns."""

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


def driven(
    factory: Callable[..., torch.optim.Optimizer], parameters: Tensor, gradient: Tensor, layout: Layout
) -> torch.optim.Optimizer:
    """An optimizer of the global parameters, seen in their shapes, whose `.grad` are views of `gradient`.

    Raises:
        ConfigError: the factory gives something else.
    """
    leaves = [view.requires_grad_() for view in layout.views(parameters)]
    for leaf, grad in zip(leaves, layout.views(gradient), strict=True):
        leaf.grad = grad
    optimizer = factory(leaves)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"outer_optimizer returned {type(optimizer).__name__}; it must be a callable that takes parameters "
            "and returns a torch.optim.Optimizer, such as partial(torch.optim.SGD, lr=0.7, momentum=0.9)."
        )
    return optimizer


@final
class TorchOuter(OuterOptimizer):
    """Drives a `torch.optim` optimizer over the global parameters, seen in their shapes.

    Args:
        factory: called with the list of parameters; e.g. `partial(torch.optim.SGD, lr=0.7, momentum=0.9,
            nesterov=True)` for DiLoCo.
        parameters: the flat vector the optimizer moves, shape (numel,); the optimizer holds views of it.
        layout: where each parameter lies in it.
    """

    def __init__(self, factory: Callable[..., torch.optim.Optimizer], parameters: Tensor, layout: Layout) -> None:
        self._parameters = parameters
        self._grad = torch.zeros_like(parameters)
        self._optimizer = optimizer = driven(factory, parameters, self._grad, layout)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "outer_optimizer=LBFGS with work='local': its line search needs losses and gradients, which rounds of local steps do "
                "not tell. Use algorithm=lbfgs(), or work='gradient' with sync_every='epoch'."
            )
        self.uses_rate = hasattr(optimizer, "inner_lr")

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
                self._optimizer.inner_lr = self.inner_lr  # type: ignore[attr-defined]
            return result.loss

        self._optimizer.step(closure)

    def apply(self, change: Tensor) -> None:
        """One `optimizer.step()` with minus what one replica changed, (numel,)."""
        torch.neg(change, out=self._grad)
        if self.uses_rate:
            self._optimizer.inner_lr = self.inner_lr  # type: ignore[attr-defined]
        self._optimizer.step()

    @property
    def asks_again(self) -> bool:
        """Whether the optimizer cannot step without a closure, which it may call again and again."""
        needed = inspect.signature(self._optimizer.step).parameters.get("closure")
        return needed is not None and needed.default is inspect.Parameter.empty

    def state_dict(self) -> Mapping[str, Any]:
        """The optimizer's own state dict."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the optimizer's state dict."""
        self._optimizer.load_state_dict(dict(state))


@final
class OnArrival(OuterOptimizer):
    """Steps once for every push of an asynchronous window, by `apply`; the window as a whole counts or does not.

    Args:
        outer: whose optimizer steps.
        rate: the mean of the replicas' learning rates from a step of their clock on, of so many; asked for if the optimizer
            needs it.

    Raises:
        ConfigError: the optimizer cannot step with the one gradient that a push is.
    """

    def __init__(self, outer: TorchOuter, rate: Callable[[int, int], float]) -> None:
        if outer.asks_again:
            raise ConfigError(
                "asynchronous=... with an outer optimizer whose step() needs a closure: a push is one gradient, and cannot be "
                "asked for again. Use Downpour, Adagrad, DelayedNesterov or SGD."
            )
        self._outer = outer
        self._rate = rate
        self.uses_rate = outer.uses_rate

    def step(self, parameters: Tensor, round_: Callable[[], RoundResult]) -> None:
        """Run a window, whose pushes move `parameters`; if it raises, they and the optimizer are as before it.

        Memory: a copy of the parameters and of the optimizer's state.
        """
        before, state = parameters.detach().clone(), copy.deepcopy(dict(self._outer.state_dict()))
        try:
            round_()
        except BaseException:
            parameters.detach().copy_(before)
            self._outer.load_state_dict(state)
            raise

    def apply(self, change: Tensor, clock: int, steps: int) -> None:
        """Take a push, (numel,), of a replica that made it in so many steps, before which its clock was at `clock`."""
        if self.uses_rate:
            self._outer.inner_lr = self._rate(clock, steps)
        self._outer.apply(change)

    def state_dict(self) -> Mapping[str, Any]:
        """The optimizer's own state dict."""
        return self._outer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the optimizer's state dict."""
        self._outer.load_state_dict(state)
