"""An asynchronous window at the driver: each push is applied when it comes, none on parameters that are too old."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Final, final

from torch import Tensor

from sparkdeep.errors import ConfigError, ProtocolError
from sparkdeep.optim.asynchronous import Asynchronous
from sparkdeep.protocol.messages import Update, Visit, parse
from sparkdeep.protocol.refusals import check_update, not_finite
from sparkdeep.protocol.values import RoundWork
from sparkdeep.protocol.wire import Frame
from sparkdeep.stages.line import Line

__all__ = ["FETCHED", "Arrivals"]

FETCHED: Final = -1
"""Stands in a record for the staleness of a visit that pushes nothing."""
_LOOK_S: Final = 0.25


@final
class Arrivals:
    """Takes the pushes of a window; `follow` and `end` run in one thread a replica.

    All that decides a bit of the parameters happens under one lock, in the order that `log` tells: a push is applied, and what
    a replica fetches with it is copied, before anything else is. The same order gives the same bits.

    With `max_staleness=s` a push waits while it would leave no order for the others to come in. A replica that is to push
    `r` more times before it fetches, `b` pushes of others behind, must have done so when `s - b + r` more pushes have been
    applied: a deadline, as for jobs on one machine, and the earliest first is the best order that there is (Jackson, 1955). So
    a push is applied if afterwards, sorted by their deadlines, all replicas that still work can keep them. The one with the
    earliest deadline never waits: its push leaves the others one fewer in front of them and one less time. Whoever waits
    thus waits for a replica that works; there is no deadlock, and no push is staler than `s`. A fetch gives a replica the latest
    deadline of all, which can be kept as `s >= (replicas - 1) * r` (`Asynchronous.least_staleness`). It is the bound of stale
    synchronous parallel training (Ho et al., 2013), counted in pushes.

    Args:
        count: of replicas.
        work: of the window, with what applies a push and the recorded order, if one is repeated.
        rule: how often replicas come in.
        parameters: the global ones, (numel,), which pushes move.
        check: called while a replica waits; raises to give up.
    """

    def __init__(
        self, count: int, work: RoundWork, rule: Asynchronous, parameters: Tensor, check: Callable[[], None]
    ) -> None:
        assert work.apply is not None, "somebody must apply what is pushed"
        self._apply = work.apply
        self._work = work
        self._rule = rule
        self._parameters = parameters.detach()
        self._check = check
        self._order = work.order
        self._left = Counter(work.order)
        self._news = threading.Condition()
        self._steps = [0] * count
        self._pushed = [0] * count
        self._behind = [0] * count
        self._working = set(range(count))
        self.log: list[list[int]] = []
        """[replica, staleness] in the order of arrival; the staleness of one that only fetches is `FETCHED`."""

    def follow(self, line: Line, room: Tensor) -> Frame:
        """Serve a replica until its window ends; gives the frame of its update.

        Args:
            line: to it.
            room: (numel,) of its own, for what it pushes and fetches.

        Raises:
            NonFiniteError: it pushes NaN or infinity.
            ReplicaLostError: it went away, or what it pushed was damaged; the window is void.
            ProtocolError: it says what does not belong there.
        """
        replica, host = line.hello.replica, line.hello.host
        while True:
            frame = line.await_update(_never, "visit")
            assert frame is not None, "nobody gives up"
            if frame.kind != "visit":
                return frame
            visit = parse(Visit, frame.header)
            spec = self._work.specs[replica]
            inside = self._steps[replica] < visit.steps < spec.num_steps and not spec.skip
            if visit.round != spec.round or not inside or not (visit.pushes or visit.fetches):
                raise ProtocolError(f"{line.who} came in with {visit} in round {spec.round}.")
            if not visit.finite:
                raise not_finite(replica, host, spec.round)
            if visit.pushes:
                line.read_change(frame, room)
            elif frame.body_bytes:
                raise ProtocolError(f"{line.who} sent {frame.body_bytes} bytes with a visit that pushes nothing.")
            line.waiting = True
            self._come(replica, visit, room)
            line.go_on(room if visit.fetches else None)

    def end(self, frame: Frame, update: Update, line: Line, room: Tensor) -> dict[str, Tensor]:
        """Take a window's update: its vector is the replica's last push. Returns its buffers; see `follow`."""
        replica = line.hello.replica
        check_update(replica, line.hello.host, update, self._work.round)
        if update.weight == 0:
            with self._news:
                self._leave(replica)
            return {}
        buffers = line.read_update(frame, update, room)
        last = Visit(round=update.round, steps=update.steps, pushes=True, fetches=False, finite=True)
        self._come(replica, last, room, last=True)
        return buffers

    def _come(self, replica: int, visit: Visit, room: Tensor, *, last: bool = False) -> None:
        with self._news:
            while not self._may_come(replica, visit, last=last):
                if not self._news.wait(timeout=_LOOK_S):
                    self._check()
            self.log.append([replica, self._behind[replica] if visit.pushes else FETCHED])
            if visit.pushes:
                pushed = self._pushed[replica]
                self._apply(room, self._work.clocks[replica] + pushed, visit.steps - pushed)
                self._pushed[replica] = visit.steps
                for other in range(len(self._behind)):
                    self._behind[other] += other != replica
            if visit.fetches:
                self._behind[replica] = 0
                room.copy_(self._parameters)
            self._steps[replica] = visit.steps
            self._left[replica] -= 1
            if last:
                self._leave(replica)
            self._news.notify_all()

    def _leave(self, replica: int) -> None:
        if self._order is not None and self._left[replica] > 0:
            raise self._of_another_run(replica)
        self._working.discard(replica)
        self._news.notify_all()

    def _may_come(self, replica: int, visit: Visit, *, last: bool) -> bool:
        if self._order is not None:
            if self._left[replica] <= 0:
                raise self._of_another_run(replica)
            return self._order[len(self.log)] == replica
        bound = self._rule.max_staleness
        if bound is None or not visit.pushes:
            return True
        left = []
        for other in self._working - ({replica} if last else set()):
            own = other == replica
            to_push = self._rule.pushes_before_fetch(visit.steps if own else self._steps[other])
            behind = (0 if visit.fetches else self._behind[other]) if own else self._behind[other] + 1
            left.append((bound - behind + to_push, to_push))
        taken = 0
        for deadline, to_push in sorted(left):
            taken += to_push
            if taken > deadline:
                return False
        return True

    def _of_another_run(self, replica: int) -> ConfigError:
        if not self._order:
            return ConfigError(
                f"round {self._work.round} is repeated from a record without arrivals: of a long run, a model's history keeps only the "
                "newest. Give records that were written as they came, by a callback or in rounds.jsonl."
            )
        return ConfigError(
            f"round {self._work.round} is repeated from a record in which replica {replica} came in "
            f"{Counter(self._order)[replica]} times, and now it does {'less' if self._left[replica] > 0 else 'more'} often: "
            "repeat a run with the rows and the n_fetch, n_push and batch_size that it had."
        )


def _never() -> bool:
    return False
