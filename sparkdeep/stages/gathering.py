"""One round at the driver: the order out to every replica, the headers admitted, the bodies summed, the mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from sparkdeep import seams
from sparkdeep.errors import ProtocolError
from sparkdeep.optim.aggregators import Aggregator, aggregator_of, shares_of
from sparkdeep.optim.asynchronous import Asynchronous
from sparkdeep.protocol.messages import Saved, Update, parse
from sparkdeep.protocol.plans import RoundSpec
from sparkdeep.protocol.refusals import common_sections
from sparkdeep.protocol.values import Globals, RoundResult, RoundWork, Traffic
from sparkdeep.stages.admission import Admission, Terms
from sparkdeep.stages.arrivals import Arrivals
from sparkdeep.stages.line import Line
from sparkdeep.tensors.encoding import Codec
from sparkdeep.tensors.mean import Combining, Partition, pool_buffers, reduced_weights
from sparkdeep.tensors.parameters import Layout, raw_bytes, unlike
from sparkdeep.tensors.state_dicts import pack_tensors

__all__ = ["Gathering", "Plane", "TrainOrder"]


@final
@dataclass(kw_only=True)
class Plane:
    """How this run's parameters travel; the same for all its rounds."""

    layout: Layout
    codec: Codec
    """Of updates."""
    wide: bool
    """Whether the outer step wants the mean in float64, or rounded once to the layout's dtype."""
    weighting: Literal["rows", "equal", "fednova"] = "rows"
    """How much each replica counts."""
    aggregator: Aggregator | Literal["mean"] = "mean"
    """How their updates become one."""
    embeddings: frozenset[str] = frozenset()
    """Names of the embeddings' parameters."""
    terms: Terms = field(default_factory=Terms)
    """When a round closes, and whom it counts."""
    ring: bool = False
    """Whether replicas add their updates up among themselves."""
    asynchronous: Asynchronous | None = None
    """How often they fetch and push within a round, where they do."""
    _rooms: dict[int, Tensor] = field(default_factory=dict, init=False)
    _mean: Tensor = field(default_factory=lambda: torch.empty(0), init=False)

    def mean(self, numel: int) -> Tensor:
        """The vector that means are written into, (numel,); the same memory every round, as fresh pages are dear."""
        dtype = torch.float64 if self.wide and not self.ring else self.layout.dtype
        if self._mean.numel() != numel or self._mean.dtype != dtype:
            self._mean = torch.empty(numel, dtype=dtype)
        return self._mean

    def room(self, replica: int) -> Tensor:
        """(numel,) for what a replica pushes and fetches: each has its own, so that a slow line holds up no other."""
        if replica not in self._rooms:
            self._rooms[replica] = self.layout.empty()
        return self._rooms[replica]


@final
@dataclass(frozen=True, kw_only=True)
class TrainOrder:
    """What replicas are told at the start of a round."""

    work: RoundWork
    start: Globals
    ahead: RoundSpec | None
    """The round that follows if a replica may begin it on its own (`overlap`)."""
    fresh: bool
    """Whether this is the first round of its stage: replicas know no parameters yet."""
    held: bool
    """Whether replicas hold the parameters already: in a ring, the mean of the round before."""

    def header(self, plane: Plane, replica: int, buffers: bytes) -> dict[str, Any]:
        """The frame's header."""
        return {
            "spec": asdict(self.work.specs[replica]),
            "clock": self.work.clocks[replica],
            "may_undo": plane.terms.may_undo,
            "ahead": asdict(self.ahead) if self.ahead is not None else None,
            "sections": self.start.sections,
            "buffer_bytes": len(buffers),
            "previous": self.fresh and self.start.previous is not None,
            "encoded": self.encoded is not None,
            "held": self.held,
            "ring": plane.ring,
            "n_fetch": plane.asynchronous.n_fetch if plane.asynchronous is not None else 0,
            "n_push": plane.asynchronous.n_push if plane.asynchronous is not None else 0,
        }

    @property
    def encoded(self) -> bytes | None:
        """What changed, for replicas that know the parameters of the round before."""
        return None if self.fresh else self.start.encoded

    def bodies(self, plane: Plane, replica: int, num_replicas: int, buffers: bytes) -> list[bytes | memoryview]:
        """The frame's body."""
        parts: list[bytes | memoryview] = []
        if self.fresh and self.start.previous is not None:
            parts.append(raw_bytes(self.start.previous))
        if self.held:
            pass
        elif self.encoded is not None:
            parts.append(self.encoded)
        elif plane.ring:
            start, stop = Partition(plane.layout.numel, num_replicas).bounds(replica)
            parts.append(raw_bytes(self.start.parameters[start:stop]))
        else:
            parts.append(raw_bytes(self.start.parameters))
        return [*parts, raw_bytes(self.start.inner), buffers]


@final
class Gathering:
    """Collects one round's updates; `exchange` runs in one thread a replica.

    Args:
        plane: of the run.
        order: of the round.
        num_replicas: in the stage.
        check: called while a replica waits for others; raises to give up.
        stall_timeout_s: after which a replica that takes nothing counts as lost.
    """

    def __init__(
        self,
        plane: Plane,
        order: TrainOrder,
        num_replicas: int,
        *,
        check: Callable[[], None],
        stall_timeout_s: float,
    ) -> None:
        self._plane = plane
        self._arrivals: Arrivals | None = None
        if plane.asynchronous is not None:
            moving = order.start.parameters
            self._arrivals = Arrivals(num_replicas, order.work, plane.asynchronous, moving, check)
            # All begin where the window does, though pushes of the first may have been applied when the last one is sent it.
            order = replace(order, start=replace(order.start, parameters=moving.detach().clone()))
        self._order = order
        self._count = num_replicas
        self._check = check
        self._stall_s = stall_timeout_s
        self._buffers = pack_tensors(order.start.buffers)
        self._admission = Admission(num_replicas, check, order.work.round, self._prepare, plane.terms)
        self._sum: Combining | None = None
        self._mean: Tensor | None = None
        self._sections: list[str] = []
        self._weights: list[float] = []
        self._received: dict[int, dict[str, Tensor]] = {}
        self._saved: dict[int, Saved] = {}
        self._traffic: dict[int, Traffic] = {}
        self.sent: set[int] = set()
        """Replicas that were given the order."""

    def exchange(self, replica: int, line: Line) -> None:
        """Send the order, and take in the replica's update.

        Raises:
            NonFiniteError, UserCodeError: never mended by repeating.
            ReplicaLostError: the replica went away, is past the deadline, or its update was damaged; the round is void.
        """
        connection = line.connection
        sent, received = connection.sent_bytes, connection.received_bytes
        self._saved[replica] = Saved(bytes=0, seconds=0.0)
        line.begin_round(self._order.work.deadline_s)
        if line.settle(self._late(replica)):
            self._ask(replica, line)
        self._traffic[replica] = Traffic(
            sent_bytes=connection.sent_bytes - sent, received_bytes=connection.received_bytes - received
        )

    def _late(self, replica: int) -> Callable[[], bool]:
        return lambda: self._admission.closed_without(replica)

    def _ask(self, replica: int, line: Line) -> None:
        line.waiting = False
        line.buffer_limit_bytes = 2 * len(self._buffers) + 4096
        header = self._order.header(self._plane, replica, self._buffers)
        bodies = self._order.bodies(self._plane, replica, self._count, self._buffers)
        line.connection.send("train", header, *bodies, timeout_s=self._stall_s)
        self.sent.add(replica)
        room = self._plane.room(replica) if self._arrivals is not None else torch.empty(0)
        frame = self._arrivals.follow(line, room) if self._arrivals else line.await_update(self._late(replica))
        if frame is None:
            line.undo(self._order.work.round)
            return
        update = parse(Update, frame.header)
        line.waiting = True
        if self._plane.ring:
            buffers = line.read_buffers(frame, update)
            self._admission.enter(replica, line.hello.host, update)
            self._take_part(replica, line)
        elif self._arrivals is not None:
            buffers = self._arrivals.end(frame, update, line, room)
            self._admission.enter(replica, line.hello.host, update)
        else:
            verdict = self._admission.enter(replica, line.hello.host, update)
            if verdict in {"late", "rolled back"}:
                line.leave(frame)
                line.undo(self._order.work.round)
                if verdict == "rolled back":
                    line.settle(_never)
                return
            # Of one that is not finite nothing comes: it has gone back by itself.
            buffers = self._add(frame, update, line) if update.weight > 0 else {}
        if update.weight > 0:
            if odd := unlike(buffers, self._order.start.buffers):
                raise ProtocolError(f"{line.who} sent other buffers than it was given: {str(odd)[:200]}.")
            self._received[replica] = buffers
        self._saved[replica] = parse(Saved, line.expect("saved").header)
        line.kept_round = self._order.work.round

    def _prepare(self, updates: list[Update]) -> None:
        seams.reach("average", round_number=self._order.work.round)
        self._sections = common_sections(updates)
        self._weights = [update.weight for update in updates]
        if self._arrivals is not None:
            return  # it was all applied
        self._mean = mean = self._plane.mean((1 + len(self._sections)) * self._plane.layout.numel)
        if self._plane.ring:
            return
        plane, start = self._plane, self._order.start
        self._sum = aggregator_of(plane.aggregator).taking(
            shares_of(updates, self._order.work.rows, plane.weighting),
            layout=plane.layout,
            start=start.parameters,
            base=start.base,
            out=mean,
            plain=plane.embeddings,
        )

    def _add(self, frame: Any, update: Update, line: Line) -> dict[str, Tensor]:
        assert self._sum is not None
        plane = self._plane
        return line.add_update(frame, update, self._sum, plane.codec, dtype=plane.layout.dtype, check=self._check)

    @property
    def held(self) -> bool:
        """Whether replicas hand the mean round, as the next round starts from it: averaging has nothing to do to it."""
        return self._plane.ring and not self._plane.wide and not self._sections and any(self._weights)

    def _take_part(self, replica: int, line: Line) -> None:
        assert self._mean is not None
        weights = reduced_weights(self._weights) if any(self._weights) else []
        line.waiting = False
        header = {"weights": weights, "sections": len(self._sections), "hold": self.held}
        line.connection.send("reduce", header, timeout_s=self._stall_s)
        if weights:
            start, stop = Partition(self._mean.numel(), self._count).bounds(replica)
            line.read_part(self._mean[start:stop])
        line.waiting = True

    def result(self, seconds: float) -> RoundResult:
        """The mean, once every replica's exchange has ended well."""
        updates = self._admission.updates
        start = self._order.start
        total_weight = sum(self._weights)
        mean, pooled = start.parameters, start.buffers
        if total_weight:
            if self._arrivals is None:
                assert self._mean is not None
                mean = self._mean if self._sum is None else self._sum.mean()
            buffers_of = [self._received.get(i, start.buffers) for i in range(self._count)]
            pooled = pool_buffers(buffers_of, self._weights, self._plane.layout.variance_of)
        elif start.base is not None:
            mean = start.base
        numel = self._plane.layout.numel
        return RoundResult(
            mean=mean[:numel],
            buffers=pooled,
            sections=self._sections,
            inner=mean[numel:],
            loss=sum(update.loss_sum for update in updates) / total_weight if total_weight else float("nan"),
            updates=updates,
            saved=[self._saved[i] for i in range(self._count)],
            seconds=seconds,
            dropped={i: verdict for i, verdict in self._admission.verdicts.items() if verdict != "counted"},
            passed_over=self._admission.passed_over,
            rolled_back=self._admission.rolled_back,
            traffic=_summed(list(self._traffic.values())),
            arrivals=self._arrivals.log if self._arrivals is not None else [],
        )


def _never() -> bool:
    return False


def _summed(parts: Sequence[Traffic]) -> Traffic:
    return Traffic(
        sent_bytes=sum(part.sent_bytes for part in parts), received_bytes=sum(part.received_bytes for part in parts)
    )
