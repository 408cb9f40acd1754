"""Corrections of client drift: what a replica adds to its gradient, so that unlike shards pull less apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from sparkdeep.checks import positive
from sparkdeep.errors import CheckpointError

__all__ = [
    "CONTROL",
    "ControlVariates",
    "DriftCorrection",
    "DriftTerm",
    "FedProx",
    "ProximalTerm",
    "Scaffold",
    "term_of",
]


class DriftCorrection:
    """What `drift_correction` may be."""


@dataclass(frozen=True)
class FedProx(DriftCorrection):
    """Pulls each replica back to where the round began: `gradient += mu * (x - start)` (Li et al., 2020)."""

    mu: float = 0.01
    """Of the paper's 0.001, 0.01, 0.1 and 1."""

    def __post_init__(self) -> None:
        positive("FedProx.mu", self.mu)


@dataclass(frozen=True)
class Scaffold(DriftCorrection):
    """Control variates (Karimireddy et al., 2020, option II): `gradient += c - c_i`.

    `c_i` is the mean gradient of this replica in its last round, `c` the mean of all replicas'. `c_i` is
    `(start - x) / sum of the steps' rates - (c - c_i)`, which is a mean of gradients for plain SGD only. It stays with
    the replica; one that has lost it begins with `c_i = c`, which corrects nothing. `c` travels with the parameters, both ways.
    """


CONTROL: Final = "control_variate"
"""Name of the section, after the parameters, in which control variates travel."""


class DriftTerm:
    """What is done in a replica's rounds beside its optimizer; here nothing, and what derives from it does more."""

    def begin(self) -> None:
        """A round begins with the parameters as they are."""

    def adjust(self) -> None:
        """Add the term to the gradients, before they are clipped."""

    def stepped(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """A local step was taken, by an optimizer with these parameter groups."""

    def end(self) -> list[Tensor] | None:
        """A round in which there were steps is over; what travels to the driver, one tensor a parameter, or None."""
        return None

    def take(self, values: Sequence[Tensor]) -> None:
        """The mean over replicas of what they sent."""

    def state_dict(self) -> Any:
        """What the next round depends on."""
        return None

    def load_state_dict(self, state: Any) -> None:
        """Go on from `state_dict`.

        Raises:
            CheckpointError: it is of other settings.
        """
        if state is not None:
            raise CheckpointError("the replica's state was kept with another drift_correction=.")

    def restart(self) -> None:
        """The state is gone: begin anew in mid-run."""


@final
class ProximalTerm(DriftTerm):
    """`gradient += mu * (x - start)`. Memory: the parameters once more."""

    def __init__(self, mu: float, parameters: Sequence[Tensor]) -> None:
        self._mu = mu
        self._parameters = list(parameters)
        self._start: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Remember where the round began."""
        self._start = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def adjust(self) -> None:
        """Pull back; parameters without a gradient are not trained."""
        for parameter, start in zip(self._parameters, self._start, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self._mu)


@final
class ControlVariates(DriftTerm):
    """`gradient += c - c_i`. Memory: the parameters three times more."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._start: list[Tensor] = []
        self._common = [torch.zeros_like(p) for p in self._parameters]
        self._own: list[Tensor] | None = [torch.zeros_like(p) for p in self._parameters]
        """None once it is lost: the common one, until this replica has trained."""
        self._places = {id(parameter): i for i, parameter in enumerate(self._parameters)}
        self._rates = [0.0] * len(self._parameters)

    @torch.no_grad()
    def begin(self) -> None:
        """Remember where the round began."""
        self._start = [p.detach().clone() for p in self._parameters]
        if self._own is None:
            self._terms = [torch.zeros_like(p) for p in self._parameters]
        else:
            self._terms = [common - own for common, own in zip(self._common, self._own, strict=True)]
        self._rates = [0.0] * len(self._parameters)

    @torch.no_grad()
    def adjust(self) -> None:
        """Add `c - c_i`, also to a gradient of 0 that autograd did not make: others may have one there."""
        for parameter, term in zip(self._parameters, self._terms, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(term)
            elif term.any():
                parameter.grad = term.clone()

    def stepped(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Sum up the rates, each parameter's own."""
        for group in groups:
            rate = float(group.get("lr", 0.0))
            for parameter in group["params"]:
                if (place := self._places.get(id(parameter))) is not None:  # frozen ones may be among them
                    self._rates[place] += rate

    @torch.no_grad()
    def end(self) -> list[Tensor] | None:
        """The new `c_i`: what moved the parameters, a step's rate taken out, less the correction in it."""
        before = [common.clone() for common in self._common] if self._own is None else self._own
        moved = zip(before, self._start, self._parameters, self._terms, self._rates, strict=True)
        # Of a parameter whose rate is 0 nothing is learned.
        self._own = [(start - p) / rate - term if rate > 0 else own for own, start, p, term, rate in moved]
        return self._own

    @torch.no_grad()
    def take(self, values: Sequence[Tensor]) -> None:
        """The new `c`."""
        for own, value in zip(self._common, values, strict=True):
            own.copy_(value)

    def state_dict(self) -> Any:
        """`c_i`; `c` comes with the parameters."""
        return {"own": self._own}

    def load_state_dict(self, state: Any) -> None:
        """Go on from `state_dict`.

        Raises:
            CheckpointError: it is of other settings.
        """
        if not isinstance(state, dict) or set(state) != {"own"}:
            raise CheckpointError("the replica's state was kept with another drift_correction=.")
        own = state["own"]
        if own is not None:
            if [t.shape for t in own] != [p.shape for p in self._parameters]:
                raise CheckpointError("the replica's control variates are not of its parameters' shapes.")
            own = [t.to(p.device, p.dtype) for t, p in zip(own, self._parameters, strict=True)]
        self._own = own

    def restart(self) -> None:
        """`c_i` is gone."""
        self._own = None


def term_of(correction: DriftCorrection | None, parameters: Sequence[Tensor]) -> DriftTerm:
    """The term of a setting, for these parameters."""
    if correction is None:
        return DriftTerm()
    if isinstance(correction, FedProx):
        return ProximalTerm(correction.mu, parameters)
    return ControlVariates(parameters)
