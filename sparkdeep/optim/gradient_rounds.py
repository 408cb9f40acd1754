"""The outer step of gradient rounds: any torch optimizer on the gradient itself; L-BFGS one iteration at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from sparkdeep.errors import ConfigError, NonFiniteError
from sparkdeep.optim.outer import OuterOptimizer, driven
from sparkdeep.protocol.messages import Update
from sparkdeep.protocol.orders import RoundResult, Traffic
from sparkdeep.tensors.parameters import Layout, raw_bytes
from sparkdeep.tracking.records import EvaluationRecord

__all__ = ["Evaluations", "GradientOuter", "place_of", "searched_too_far"]


def place_of(parameters: Tensor) -> bytes:
    """16 bytes that name these parameters to the last bit."""
    return hashlib.blake2b(raw_bytes(parameters), digest_size=16).digest()


@final
class Evaluations:
    """What was evaluated in a round, by the bytes of the parameters.

    L-BFGS with one iteration a step asks again, as each begins, for the loss and gradient with which the one before ended: its
    line search has been at that very point, so that asking costs nothing. An attempt that failed leaves what it found out to
    the next one. What is kept between rounds is not part of a checkpoint: after a restart it is evaluated once more, to the
    same bits.

    Memory: a gradient for each evaluation of the round, some 26 at most; of a round that is over, one.

    Args:
        remember: whether results are functions of the parameters alone: with all rows, in eval mode.
    """

    def __init__(self, *, remember: bool) -> None:
        self.remember = remember
        self._known: dict[bytes, RoundResult] = {}
        self._fresh: list[RoundResult] = []
        self._first: RoundResult | None = None
        self.records: list[EvaluationRecord] = []
        """One a call of the closure in this attempt."""

    def begin(self) -> None:
        """Begin an attempt at a round."""
        self._fresh, self._first, self.records = [], None, []

    def at(self, parameters: Tensor, evaluate: Callable[[], RoundResult]) -> RoundResult:
        """What is known at `parameters`, (numel,), or else what `evaluate` gives."""
        began = time.perf_counter()
        place = place_of(parameters) if self.remember else b""
        result = self._known.get(place)
        cached = result is not None
        if result is None:
            result = evaluate()
            if self.remember:
                # A copy: the next evaluation's mean is written over this one's.
                result = self._known[place] = dataclasses.replace(result, mean=result.mean.clone())
            self._fresh.append(result)
        self._first = self._first or result
        self.records.append(
            EvaluationRecord(
                loss=result.loss,
                gradient_norm=float(torch.linalg.vector_norm(result.mean.to(torch.float64))),
                seconds=time.perf_counter() - began,
                cached=cached,
            )
        )
        return result

    def end(self, parameters: Tensor) -> RoundResult:
        """The round as a whole, which ended at `parameters`, (numel,); what is known elsewhere is forgotten.

        Its loss is that at its end where the line search has been there, as it has, and else that with which it began.
        """
        assert self._first is not None, "the optimizer's step did not call its closure"
        if not self.remember:
            return self._first
        place = place_of(parameters)
        self._known = {place: self._known[place]} if place in self._known else {}
        at_end = self._known.get(place, self._first)
        return dataclasses.replace(
            at_end,
            updates=[
                _added(update, [one.updates[i] for one in self._fresh]) for i, update in enumerate(at_end.updates)
            ],
            seconds=sum(one.seconds for one in self._fresh),
            traffic=Traffic(
                sent_bytes=sum(one.traffic.sent_bytes for one in self._fresh),
                received_bytes=sum(one.traffic.received_bytes for one in self._fresh),
            ),
        )


def _added(update: Update, parts: Sequence[Update]) -> Update:
    """A replica's header for the whole round: rows and times of all its evaluations."""
    return dataclasses.replace(
        update,
        rows=sum(part.rows for part in parts),
        compute_s=sum(part.compute_s for part in parts),
        input_s=sum(part.input_s for part in parts),
        logged=update.logged if parts else {},
    )


# Of one line search: the default of torch's own. With `max_iter=1` the optimizer's default would allow none at all.
_SEARCHES: Final = 25


@dataclass(frozen=True, kw_only=True)
class _Seen:
    loss: float
    largest: float
    """Component of the gradient, as to its size."""


@final
class GradientOuter(OuterOptimizer):
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

    def _one_iteration(self) -> None:
        if self.line_search:
            self._optimizer.param_groups[0].update(max_iter=1, max_eval=1 + _SEARCHES)

    def step(self, parameters: Tensor, round_: Callable[[], RoundResult]) -> None:
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


def searched_too_far(error: NonFiniteError) -> NonFiniteError:
    """The error of a line search whose step led out of what numbers can say; clipping and the replicas' rate have no part in it."""
    return NonFiniteError(
        f"round {error.round}: the loss or the gradient became NaN or infinite at parameters that the line search tried; those of "
        "the round before stay. Start it with a smaller step (lr= of LBFGS), scale the features, train in float64, or regularize.",
        round_number=error.round,
        replica=error.replica,
    )
