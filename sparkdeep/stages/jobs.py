"""The driver's end where no connection stays open: every round is a job of its own that takes an order and replies."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, final

import torch
from torch import Tensor

from sparkdeep.errors import ProtocolError, ReplicaLostError, ShardLostError, SparkdeepError
from sparkdeep.optim.averaging import Averaging
from sparkdeep.protocol.messages import Hello, Open, Opened, RoundSpec, Saved, Update, parse
from sparkdeep.protocol.orders import (
    Globals,
    Job,
    JobRunner,
    Order,
    Parcel,
    Reply,
    RoundResult,
    RoundWork,
    Stored,
    Traffic,
    digest_of,
    mean_loss,
)
from sparkdeep.protocol.refusals import check_updates
from sparkdeep.rounds.run_state import RunState
from sparkdeep.rounds.transport import FitParts, Opening, Snapshot, job_description, stage_description
from sparkdeep.tensors.encoding import codec_named
from sparkdeep.tensors.parameters import raw_bytes
from sparkdeep.tensors.state_dicts import pack_tensors, unpack_dict, unpack_tensors
from sparkdeep.versions import versions

__all__ = ["JobReplicas", "JobStages"]

# A job cannot say how far it is: it counts as lost after this many times the longest silence that a replica may keep,
# or the longest round so far.
_PATIENCE: Final = 10


@final
@dataclass(frozen=True, kw_only=True)
class JobStages:
    """Replicas without a connection: every round is a job."""

    runner: JobRunner

    def replicas(self, parts: FitParts) -> JobReplicas:
        """The replicas of a fit."""
        return JobReplicas(runner=self.runner, parts=parts)


@final
@dataclass(kw_only=True)
class JobReplicas:
    """Runs every round, every validation and every look at replica states as one job.

    A replica takes its state from the executor's disk, where the round before left it, and keeps it there.
    """

    runner: JobRunner
    parts: FitParts
    _state: RunState = field(init=False)
    _snapshot: Snapshot | None = field(default=None, init=False)
    _send_states: bool = field(default=True, init=False)
    _renew: bool = field(default=False, init=False)
    _trained: tuple[int, str] = field(default=(0, ""), init=False)
    """The last round that was trained, and the job that did it."""
    _kept_by: str = field(default="", init=False)
    """The job whose states on the executors' disks count."""
    _mean: Stored | None = field(default=None, init=False)
    """What the exchange holds of the last round: the next one starts from it if nothing else moved the parameters."""
    _jobs: list[str] = field(default_factory=list, init=False)
    """Jobs whose folders in the exchange are still there."""
    _longest_s: float = field(default=0.0, init=False)
    _fixed: bytes | None = field(default=None, init=False)
    _sent_bytes: int = field(default=0, init=False)

    # -- what the loop calls ---------------------------------------------------------------------------------------

    def ready(self, state: RunState, latest: Callable[[], Snapshot | None]) -> Opening:
        """See `Replicas`: nothing is opened before there is an order, so that a job's start is part of its exchange."""
        if self._renew:
            self.runner.renew()
            self._renew = False
        parts = self.parts
        if state.generation.num_replicas != len(parts.shards):  # a checkpoint goes on that had another number
            state.deal(parts.shards, parts.local, parts.settings)
        self._state = state
        self._snapshot = latest() if self._send_states else None
        return Opening()

    def rest(self, state: RunState, round_s: float | None = None) -> None:
        """Nothing is open."""
        del state, round_s

    def discard(self) -> None:
        """After a failure nothing is taken for granted: not the exchange's mean, and not the executors' states."""
        self._mean = None
        self._send_states = True

    # -- jobs ------------------------------------------------------------------------------------------------------

    def train(self, work: RoundWork, start: Globals, ahead: RoundSpec | None = None) -> RoundResult:
        """Run one round as one job, the same for all replicas; none is begun ahead, and the job has its own deadline.

        Raises:
            NonFiniteError, UserCodeError: never mended by repeating.
            ReplicaLostError: a task was lost, or gave no reply in time; the round can be repeated.
        """
        del ahead
        began = time.perf_counter()
        what = stage_description(self._state.committed, 1, self._state.schedule.num_rounds)
        replies = self._run(self._job("train", start, work), what)
        hosts = [parse(Hello, reply.header["hello"]).host for reply in replies]
        updates = [parse(Update, reply.header["update"]) for reply in replies]
        sections = check_updates(updates, hosts, work.round)
        parts = self.parts
        codec = codec_named(parts.local.codec)
        averaging = Averaging(layout=parts.layout, codec=codec, wide=parts.wide, pooling=parts.pooling)
        vector, buffers = start.parameters.to(torch.float64), start.buffers
        if any(update.weight for update in updates):
            if self.runner.exchange is not None:
                vector, buffers = self._exchanged(replies[0], sections)
            else:
                vector, buffers = averaging.mean(updates, lambda i: replies[i].body, start.base, start.buffers)
        self._send_states = False
        self._trained = (work.round, replies[0].header["job"])
        numel = parts.layout.numel
        return RoundResult(
            mean=vector[:numel],
            buffers=buffers,
            sections=sections,
            inner=vector[numel:],
            loss=mean_loss(updates),
            updates=updates,
            hosts=hosts,
            reset=[i for i, reply in enumerate(replies) if parse(Opened, reply.header["opened"]).state == "reset"],
            saved=[parse(Saved, reply.header["saved"]) for reply in replies],
            seconds=time.perf_counter() - began,
            traffic=Traffic(sent_bytes=self._sent_bytes, received_bytes=sum(len(reply.body) for reply in replies)),
        )

    def evaluate(self, model: Globals) -> list[dict[str, Any]]:
        """Score the global parameters as one job; one result a replica, in order."""
        what = job_description("validation", self._state.committed, self._state.schedule.num_rounds)
        return [unpack_dict(reply.body) for reply in self._run(self._job("evaluate", model), what)]

    def states(self, clocks: Sequence[int]) -> list[bytes]:
        """Every replica's state, from its executor's disk, as one job; none where none are kept."""
        del clocks
        if not self.runner.keeps_states:
            return []
        what = job_description("states", self._state.committed, self._state.schedule.num_rounds)
        return [reply.body for reply in self._run(self._job("state"), what)]

    def _job(
        self, kind: Literal["train", "evaluate", "state"], start: Globals | None = None, work: RoundWork | None = None
    ) -> Job:
        state, parts, settings = self._state, self.parts, self.parts.settings
        if state.committed == self._trained[0]:
            self._kept_by = self._trained[1]
        sent = self._sent() if start is not None else ()
        clock = state.schedule.clock(state.committed, state.consumed, 0)
        exchange = self.runner.exchange if work is not None else None
        order, body = (Order(), None) if start is None else self._ordered(start, work, clock)
        if self._fixed is None:
            self._fixed = parts.fixed()
        return Job(
            run=parts.run,
            name=secrets.token_hex(8),
            kind=kind,
            order=order,
            opening=Open(
                committed=state.committed,
                scheduler_steps=clock,
                state="sent" if sent else "local" if state.committed and self.runner.keeps_states else "fresh",
                kept_round=state.committed,
                kept_by=self._kept_by,
                tensor_bytes=0,
                keep=self.runner.keeps_states,
            ),
            settings=parts.plan.settings,
            schema=parts.plan.schema,
            facts=state.generation.shards,
            versions=versions(),
            durable=settings.replica_state == "durable",
            body=body,
            program=None if start is None else self.runner.ship("program", parts.plan.program),
            fixed=self.runner.ship("fixed", self._fixed) if self._fixed and start is not None else None,
            states=sent,
            exchange=exchange,
            wide=parts.wide,
            stale=self._stale(body) if exchange is not None else (),
            timeout_s=settings.open_timeout_s + _PATIENCE * max(settings.stall_timeout_s, self._longest_s),
        )

    def _ordered(self, start: Globals, work: RoundWork | None, clock: int) -> tuple[Order, Parcel]:
        """The order of a round, or of scores, and its body on its way."""
        buffers = pack_tensors(start.buffers)
        data = b"".join([raw_bytes(start.parameters), raw_bytes(start.inner), buffers])
        self._sent_bytes = len(data)  # once: Spark hands it on to the executors
        order = Order(
            spec=None if work is None else work.specs[0],
            clock=clock,
            sections=start.sections,
            buffer_bytes=len(buffers),
        )
        if self._mean is not None and self._mean.digest == digest_of(data):
            return order, self._mean
        return order, self.runner.ship("start", data)

    def _sent(self) -> tuple[Parcel, ...]:
        snapshot = self._snapshot
        if not self._send_states or snapshot is None or snapshot.round != self._state.committed:
            return ()
        states = [snapshot.replica(i) for i in range(self.runner.num_replicas)]
        return tuple(self.runner.ship(f"state-{i}", data) for i, data in enumerate(states) if data is not None)

    def _stale(self, start: Parcel | None) -> tuple[str, ...]:
        """Earlier jobs' folders, but that of the mean from which the round starts."""
        names = start.names if isinstance(start, Stored) else ()
        return tuple(job for job in self._jobs if not any(f"/{job}/" in name for name in names))

    def _run(self, job: Job, what: str) -> list[Reply]:
        began = time.monotonic()
        if job.exchange is not None:
            self._jobs = [*(name for name in self._jobs if name not in job.stale), job.name]
        try:
            replies = self.runner.run(
                job, what, timeout_s=job.timeout_s, idle_timeout_s=self.parts.settings.open_timeout_s
            )
        except ShardLostError:
            self._renew = True
            raise
        except SparkdeepError:
            raise
        except Exception as error:
            raise ReplicaLostError(f"the job failed: {type(error).__name__}: {error}") from error
        self._longest_s = max(self._longest_s, time.monotonic() - began)
        ordered = self._checked(job, replies)
        for i, reply in enumerate(ordered):
            for line in reply.header.get("lines", ()):
                self.parts.on_log(i, str(line))
        return ordered

    def _checked(self, job: Job, replies: Sequence[Reply]) -> list[Reply]:
        """The replies in replica order; what does not belong to this job is refused."""
        by_replica = {int(reply.header["replica"]): reply for reply in replies if reply.header["job"] == job.name}
        if len(replies) != len(by_replica) or sorted(by_replica) != list(range(self.runner.num_replicas)):
            raise ProtocolError(
                f"job {job.name} had {len(replies)} replies, from replicas {sorted(by_replica)} of "
                f"{self.runner.num_replicas}."
            )
        return [by_replica[i] for i in range(self.runner.num_replicas)]

    def _exchanged(self, reply: Reply, sections: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean that the first replica took, in float64, and the pooled buffers."""
        stored, body = reply.header["mean"], reply.body
        dtype = torch.float64 if self.parts.wide else self.parts.layout.dtype
        size = (1 + len(sections)) * self.parts.layout.numel * dtype.itemsize
        if len(body) < size:
            raise ProtocolError(f"the mean has {len(body)} bytes; its vector alone has {size}.")
        self._mean = Stored(**{**stored, "folder": str(self.runner.exchange), "names": tuple(stored["names"])})
        vector: Tensor = torch.frombuffer(bytearray(body[:size]), dtype=dtype).to(torch.float64)
        return vector, unpack_tensors(body[size:])
