"""What makes a run asynchronous: how often replicas fetch and push, how old a push may be, whose turn it is, and the outer step."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparkdeep.checks import at_least
from sparkdeep.errors import ConfigError
from sparkdeep.optim.outer import TorchOuter
from sparkdeep.protocol.messages import Visit
from sparkdeep.protocol.orders import RoundResult
from sparkdeep.tensors.parameters import Layout

__all__ = ["FETCHED", "Asynchronous", "OnArrival", "Turns"]

FETCHED: Final = -1
"""Stands in a record for the staleness of a visit that pushes nothing."""


@dataclass(frozen=True)
class Asynchronous:
    """Replicas fetch and push on their own, and the driver applies each push when it arrives (Downpour; Dean et al., 2012).

    A round is a window: `sync_every` local steps of every replica, or `time_budget_s` seconds, in which nobody waits for anybody;
    at its end all have arrived, so that it can be scored, kept and repeated.
    """

    n_fetch: int = 1
    """Local steps between fetches of the global parameters."""
    n_push: int = 1
    """Local steps between pushes of what the replica changed since its last push."""
    max_staleness: int | None = None
    """So many pushes of others may be applied between a replica's fetch and its push; faster replicas wait for it to come.
    None: any number within the window."""

    def __post_init__(self) -> None:
        for name in ("n_fetch", "n_push"):
            at_least(f"Asynchronous.{name}", getattr(self, name), 1)
        if self.max_staleness is not None:
            at_least("Asynchronous.max_staleness", self.max_staleness, 0)

    def pushes_before_fetch(self, steps: int) -> int:
        """How often a replica that has done so many steps of a window pushes before it has fetched again, at most.

        Its next fetch may come with a push, or its window may end before with one.
        """
        fetch = (steps // self.n_fetch + 1) * self.n_fetch
        return (fetch - 1) // self.n_push - steps // self.n_push + 1

    def least_staleness(self, num_replicas: int) -> int:
        """The smallest bound that can be kept: every other replica may push as often as one does between its fetches."""
        most = max(self.pushes_before_fetch(cycle * self.n_fetch) for cycle in range(self.n_push))
        return (num_replicas - 1) * most


@final
class Turns:
    """Whose turn it is in a window: a pure account of who came in when; locks and bytes are elsewhere.

    With `max_staleness=s` a push waits while it would leave no order for the others to come in. A replica that is to push
    `r` more times before it fetches, `b` pushes of others behind, must have done so when `s - b + r` more pushes have been
    applied: a deadline, as for jobs on one machine, and the earliest first is the best order that there is (Jackson, 1955). So
    a push may come if afterwards, sorted by their deadlines, all replicas that still work can keep them. The one with the
    earliest deadline never waits: its push leaves the others one fewer in front of them and one less time. Whoever waits
    thus waits for a replica that works; there is no deadlock, and no push is staler than `s`. A fetch gives a replica the latest
    deadline of all, which can be kept as `s >= (replicas - 1) * r` (`Asynchronous.least_staleness`). It is the bound of stale
    synchronous parallel training (Ho et al., 2013), counted in pushes.

    Args:
        count: of replicas.
        rule: how often they come in.
        round_number: of the window, for messages.
        recorded: the replicas in the order in which they came in when the window was recorded; None: it is the first time.
    """

    def __init__(
        self, count: int, rule: Asynchronous, *, round_number: int, recorded: Sequence[int] | None = None
    ) -> None:
        self._rule = rule
        self._round = round_number
        self._recorded = recorded
        self._left = Counter(recorded)
        self.steps = [0] * count
        """What each had done of the window when it last came in."""
        self._pushed = [0] * count
        self._behind = [0] * count
        self.working = set(range(count))
        """Replicas whose window has not ended."""
        self.log: list[list[int]] = []
        """[replica, staleness] in the order of arrival; the staleness of one that only fetches is `FETCHED`."""

    def may_come(self, replica: int, visit: Visit, *, last: bool) -> bool:
        """Whether it may come in now; `last`: it will not come again.

        Raises:
            ConfigError: in the record it did not come in so often.
        """
        if self._recorded is not None:
            if self._left[replica] <= 0:
                raise self._of_another_run(replica)
            return self._recorded[len(self.log)] == replica
        bound = self._rule.max_staleness
        if bound is None or not visit.pushes:
            return True
        left = []
        for other in self.working - ({replica} if last else set()):
            own = other == replica
            to_push = self._rule.pushes_before_fetch(visit.steps if own else self.steps[other])
            behind = (0 if visit.fetches else self._behind[other]) if own else self._behind[other] + 1
            left.append((bound - behind + to_push, to_push))
        taken = 0
        for deadline, to_push in sorted(left):
            taken += to_push
            if taken > deadline:
                return False
        return True

    def come(self, replica: int, visit: Visit) -> int:
        """Write down a visit, which `may_come`; gives the replica's steps when it last pushed."""
        self.log.append([replica, self._behind[replica] if visit.pushes else FETCHED])
        before = self._pushed[replica]
        if visit.pushes:
            self._pushed[replica] = visit.steps
            self._behind = [behind + (other != replica) for other, behind in enumerate(self._behind)]
        if visit.fetches:
            self._behind[replica] = 0
        self.steps[replica] = visit.steps
        self._left[replica] -= 1
        return before

    def leave(self, replica: int) -> None:
        """Its window ends.

        Raises:
            ConfigError: in the record it came in more often.
        """
        if self._recorded is not None and self._left[replica] > 0:
            raise self._of_another_run(replica)
        self.working.discard(replica)

    def _of_another_run(self, replica: int) -> ConfigError:
        if not self._recorded:
            return ConfigError(
                f"round {self._round} is repeated from a record without arrivals: of a long run, a model's history keeps only the "
                "newest. Give records that were written as they came, by a callback or in rounds.jsonl."
            )
        return ConfigError(
            f"round {self._round} is repeated from a record in which replica {replica} came in "
            f"{Counter(self._recorded)[replica]} times, and now it does {'less' if self._left[replica] > 0 else 'more'} often: "
            "repeat a run with the rows and the n_fetch, n_push and batch_size that it had."
        )


@final
class OnArrival(TorchOuter):
    """Steps once for every push of an asynchronous window, by `apply`; the window as a whole counts or does not.

    Args:
        factory, parameters, layout: as of `TorchOuter`.
        rule: how often replicas come in.
        recorded: by round, the replicas in the order in which they came in, of a recorded run that is repeated.
        rate: the mean of the replicas' learning rates from a step of their clock on, of so many, one a parameter; asked for
            if the optimizer needs it.

    Raises:
        ConfigError: the optimizer cannot step with the one gradient that a push is.
    """

    def __init__(
        self,
        factory: Callable[..., Optimizer],
        parameters: Tensor,
        layout: Layout,
        rule: Asynchronous,
        *,
        recorded: Mapping[int, Sequence[int]],
        rate: Callable[[int, int], Sequence[float]],
    ) -> None:
        super().__init__(factory, parameters, layout)
        needed = inspect.signature(self._optimizer.step).parameters.get("closure")
        if needed is not None and needed.default is inspect.Parameter.empty:  # which it may call again and again
            raise ConfigError(
                "asynchronous=... with an outer optimizer whose step() needs a closure: a push is one gradient, and cannot be "
                "asked for again. Use Downpour, Adagrad, DelayedNesterov or SGD."
            )
        self.rule = rule
        self.recorded = recorded
        self._rate = rate

    def step(self, parameters: Tensor, round_: Callable[[], RoundResult]) -> None:
        """Run a window, whose pushes move `parameters`; if it raises, they and the optimizer are as before it.

        Memory: a copy of the parameters and of the optimizer's state.
        """
        before, state = parameters.detach().clone(), copy.deepcopy(dict(self.state_dict()))
        try:
            round_()
        except BaseException:
            parameters.detach().copy_(before)
            self.load_state_dict(state)
            raise

    def apply(self, change: Tensor, clock: int, steps: int) -> None:
        """Take a push, (numel,), of a replica that made it in so many steps, before which its clock was at `clock`."""
        torch.neg(change, out=self._grad)
        if self.uses_rate:
            self.tell(self._rate(clock, steps))
        self._optimizer.step()
