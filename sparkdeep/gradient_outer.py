"""The outer step of gradient rounds: any torch optimizer on the gradient itself; L-BFGS one iteration at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from sparkdeep.errors import ConfigError
from sparkdeep.evaluations import place_of
from sparkdeep.outer import RoundMean, driven
from sparkdeep.parameters import Layout

__all__ = ["GradientOuter"]

# Of one line search: the default of torch's own. With `max_iter=1` the optimizer's default would allow none at all.
_SEARCHES: Final = 25


@dataclass(frozen=True, kw_only=True)
class _Seen:
    loss: float
    largest: float
    """Component of the gradient, as to its size."""


@final
class GradientOuter:
    """Drives a `torch.optim` optimizer over the global parameters, with the mean gradient as `.grad`: nothing is negated.

    With Adam and the like this is data-parallel training, as exact as one process with all the rows. `torch.optim.LBFGS`
    (Sandblaster's; Dean et al., 2012) takes one iteration a step, so that the run can go on from each of them.

    Args:
        factory: called with the list of parameters.
        parameters: the flat vector the optimizer moves, shape (numel,); the optimizer holds views of it.
        layout: where each parameter lies in it.
        clip: largest 2-norm of the whole gradient, or None.
        lr_scheduler: called with the optimizer, and stepped once a round, or None.
    """

    wants_rate = False
    inner_lr = 1.0

    def __init__(
        self,
        factory: Callable[..., torch.optim.Optimizer],
        parameters: Tensor,
        layout: Layout,
        *,
        clip: float | None = None,
        lr_scheduler: Callable[..., Any] | None = None,
    ) -> None:
        self._parameters = parameters
        self._gradient = torch.zeros_like(parameters)
        self._optimizer = driven(factory, parameters, self._gradient, layout)
        self._clip = clip
        self.line_search = isinstance(self._optimizer, torch.optim.LBFGS)
        """Whether a step evaluates at parameters of its choice, so that evaluations must be functions of these alone."""
        if self.line_search and clip is not None:
            raise ConfigError(
                f"clip_grad_norm={clip!r} with outer_optimizer=LBFGS: a clipped gradient is not that of the loss, and the line "
                "search would fail. Leave clip_grad_norm out."
            )
        self._one_iteration()
        self._scheduler = lr_scheduler(self._optimizer) if lr_scheduler is not None else None
        self._seen: dict[bytes, _Seen] = {}
        self.stopped = ""

    def _one_iteration(self) -> None:
        if self.line_search:
            self._optimizer.param_groups[0].update(max_iter=1, max_eval=1 + _SEARCHES)

    def step(self, parameters: Tensor, round_: Callable[[], RoundMean]) -> None:
        """One `optimizer.step(closure)`; each call of the closure evaluates loss and gradient at `parameters` as they are then."""
        assert parameters is self._parameters, "the outer optimizer holds views of another vector"
        self._seen.clear()

        def closure() -> float:
            result = round_()
            with torch.no_grad():
                self._gradient.copy_(result.mean)
            if self._clip is not None:
                nn.utils.clip_grad_norm_(self._leaves(), self._clip)
            if self.line_search:
                self._seen[place_of(parameters)] = _Seen(loss=result.loss, largest=float(self._gradient.abs().max()))
            return result.loss

        if not self.line_search:
            self._optimizer.step(closure)
        else:
            began = place_of(parameters)
            with self._undone_if_it_fails():
                self._optimizer.step(closure)
            self.stopped = self._verdict(began)
        if self._scheduler is not None:
            self._scheduler.step()

    def _leaves(self) -> list[Tensor]:
        return [leaf for group in self._optimizer.param_groups for leaf in group["params"]]

    @contextmanager
    def _undone_if_it_fails(self) -> Iterator[None]:
        """A line search moves parameters before it has evaluated: what it has done is taken back if that fails."""
        state = self._optimizer.state
        before, parameters = {leaf: _copied(own) for leaf, own in state.items()}, self._parameters.detach().clone()
        try:
            yield
        except BaseException:
            state.clear()
            state.update(before)
            with torch.no_grad():
                self._parameters.copy_(parameters)
            raise

    def _verdict(self, began: bytes) -> str:
        """Why torch would have broken off after this iteration if it had been one of many; "" where it would not."""
        group, state = self._optimizer.param_groups[0], self._optimizer.state[self._leaves()[0]]
        place = place_of(self._parameters)
        seen, tolerance = self._seen.get(place), group["tolerance_change"]
        if seen is not None and seen.largest <= group["tolerance_grad"]:
            return (
                f"converged: no component of the gradient exceeds {seen.largest:.3g}, "
                f"and tolerance_grad={group['tolerance_grad']:g}"
            )
        if place == began:
            return "converged: no step along the search direction lowers the loss"
        if (moved := float((state["d"] * state["t"]).abs().max())) <= tolerance:
            return f"converged: no parameter moved by more than {moved:.3g}, and tolerance_change={tolerance:g}"
        if seen is not None and (change := abs(seen.loss - state["prev_loss"])) < tolerance:
            return f"converged: the loss changed by {change:.3g}, and tolerance_change={tolerance:g}"
        return ""

    def state_dict(self) -> Mapping[str, Any]:
        """The state dicts of the optimizer and its scheduler."""
        scheduler = None if self._scheduler is None else self._scheduler.state_dict()
        return {"optimizer": self._optimizer.state_dict(), "scheduler": scheduler}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._one_iteration()
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """As it is now: L-BFGS changes its lists in place, and the gradient before; of other tensors it makes new ones."""
    return {
        name: list(value)
        if isinstance(value, list)
        else value.clone()
        if name == "prev_flat_grad" and value is not None
        else value
        for name, value in state.items()
    }
