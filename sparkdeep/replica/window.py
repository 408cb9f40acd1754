"""A replica's part of an asynchronous window: between its steps it pushes what it changed, and fetches what there is."""

from __future__ import annotations

import dataclasses
import time
from typing import final

import torch

from sparkdeep.errors import ProtocolError
from sparkdeep.protocol.messages import RoundSpec, Visit
from sparkdeep.replica.link import ReplicaLink
from sparkdeep.replica.replica import Replica
from sparkdeep.replica.update import LocalResult

__all__ = ["ReplicaWindow"]


@final
class ReplicaWindow:
    """Trains a window of a Downpour run (Dean et al., 2012).

    After every `n_push` steps of the window it pushes, after every `n_fetch` it fetches; at its end it pushes what is left, as
    the window's update. What is pushed is what its own steps changed, added up over the fetches in between.

    Memory: two vectors beside the replica's.

    Args:
        link: to the driver.
        replica: the model and its data, at the window's start.
        n_fetch: steps between fetches.
        n_push: steps between pushes.
    """

    def __init__(self, link: ReplicaLink, replica: Replica, *, n_fetch: int, n_push: int) -> None:
        if n_fetch < 1 or n_push < 1:
            raise ProtocolError(f"the driver orders a fetch every {n_fetch} steps, and a push every {n_push}.")
        self._link = link
        self._replica = replica
        self._n_fetch = n_fetch
        self._n_push = n_push
        self._base = torch.empty_like(replica.exchange.known)
        """(numel,): the parameters from which its newest steps began."""
        self._change = torch.zeros_like(self._base)
        """(numel,): what it changed since its last push, up to `_base`."""
        self._steps = -1
        self._waited_s = 0.0
        """For visits, which are no computing."""
        layout = replica.layout
        self._rounds_off = any(entry.dtype != layout.dtype for entry in layout.entries)

    def train(self, spec: RoundSpec) -> LocalResult:
        """Do the window; gives its last push, with the rows, steps and loss of all of it."""
        self._begin()
        self._waited_s = 0.0
        result = self._replica.train(spec, lambda share: self._between(spec.round, share))
        if result.update.weight == 0:
            return result
        self._add_up()
        update = dataclasses.replace(result.update, compute_s=max(0.0, result.update.compute_s - self._waited_s))
        return dataclasses.replace(result, update=update, vector=self._change)

    def _begin(self) -> None:
        """Its steps go on from the parameters that the model holds, which are those fetched in the model's own precision."""
        exchange = self._replica.exchange
        self._base.copy_(exchange.end() if self._rounds_off else exchange.known)

    def _add_up(self) -> torch.Tensor:
        """Add what changed since `_base`, and go on from there; gives all that there is to push."""
        own = self._replica.exchange.end()
        self._change += torch.sub(own, self._base, out=self._base)
        self._base.copy_(own)
        return self._change

    def _between(self, round_number: int, share: float) -> None:
        if share == 1.0:
            return
        self._steps += 1  # the call before the first step makes it 0
        pushes, fetches = self._steps % self._n_push == 0, self._steps % self._n_fetch == 0
        if self._steps > 0 and (pushes or fetches):
            began = time.perf_counter()
            with self._replica.aside():
                self._visit(round_number, pushes=pushes, fetches=fetches)
            self._waited_s += time.perf_counter() - began

    def _visit(self, round_number: int, *, pushes: bool, fetches: bool) -> None:
        exchange = self._replica.exchange
        change = self._add_up()
        visit = Visit(
            round=round_number,
            steps=self._steps,
            pushes=pushes,
            fetches=fetches,
            finite=exchange.finite(change) if pushes else True,
        )
        self._link.visit(visit, change, self._replica.number)
        if pushes:
            change.zero_()
        if fetches:
            self._link.fetched(exchange.known)
            exchange.write(exchange.known)
            self._begin()
