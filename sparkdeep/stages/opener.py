"""When stages open and close, and with which replica states they begin."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, final

from sparkdeep import seams
from sparkdeep.errors import ReplicaLostError
from sparkdeep.optim.aggregators import embeddings_of
from sparkdeep.optim.averaging import Averaging
from sparkdeep.protocol.messages import Hello, Open, RoundSpec, ShardFacts, Ticket
from sparkdeep.protocol.orders import Globals, RoundResult, RoundWork
from sparkdeep.protocol.refusals import check_shard, check_versions
from sparkdeep.rounds.run_state import RunState
from sparkdeep.rounds.transport import FitParts, Opening, Snapshot, rounds_to_run, stage_description
from sparkdeep.stages.admission import Terms
from sparkdeep.stages.arrivals import Arrivals
from sparkdeep.stages.collector import Plane
from sparkdeep.stages.coordinator import Coordinator
from sparkdeep.stages.ring import Ring, available, choose, needs_trial
from sparkdeep.stages.staffing import Launcher, Staffing
from sparkdeep.stages.stage import Stage
from sparkdeep.stages.star import Star
from sparkdeep.tensors.encoding import codec_named
from sparkdeep.versions import versions

__all__ = ["SocketReplicas", "SocketStages", "StateLostError"]


# A ring is only tried: where executors cannot reach each other, the star is taken after this long.
_RING_TRIAL_S: Final = 30.0
# Rounds that are left where nobody knows.
_MANY: Final = 1 << 30


class StateLostError(ReplicaLostError):
    """A replica's state is gone although it was promised durable: the run goes back to the last snapshot."""


@final
@dataclass(frozen=True, kw_only=True)
class SocketStages:
    """Replicas that dial in, and stay for the rounds of a stage."""

    launcher: Launcher
    """Who starts them."""
    coordinator: Coordinator
    """Where they dial in."""

    def replicas(self, parts: FitParts) -> SocketReplicas:
        """The replicas of a fit."""
        return SocketReplicas(launcher=self.launcher, coordinator=self.coordinator, parts=parts)


@final
@dataclass(kw_only=True)
class SocketReplicas:
    """Opens a stage when a round needs one, and closes it when it is due."""

    launcher: Launcher
    coordinator: Coordinator
    parts: FitParts
    staffing: Staffing = field(init=False)
    """How many replicas."""
    plane: Plane = field(init=False)
    """How parameters travel."""
    _changed: str = field(default="", init=False)
    """Such as "3 -> 2" where the number of replicas changed since a round was counted."""
    _stage: Stage | None = field(default=None, init=False)
    _opened_at: float = field(default=0.0, init=False)
    _opening_s: float = field(default=0.0, init=False)
    _round: int = field(default=0, init=False)
    """The last one that the open stage was given, until it is committed; else 0."""
    _rounds: int = field(default=0, init=False)
    """How many it was given."""
    _planned: int | None = field(default=None, init=False)
    _renew: bool = field(default=False, init=False)
    _kept: dict[int, tuple[int, str]] = field(default_factory=dict, init=False)
    """Replica -> round and stage of the state on its executor's disk that counts."""
    _reset: list[int] = field(default_factory=list, init=False)
    """Replicas whose state was lost before the stage's first round."""

    def __post_init__(self) -> None:
        parts, settings = self.parts, self.parts.settings
        self.staffing = Staffing(launcher=self.launcher, shards=parts.shards, local=parts.local, settings=settings)
        averaging = Averaging(
            layout=parts.layout,
            codec=codec_named(parts.local.codec),
            wide=parts.wide,
            weighting=settings.shares,
            aggregator=settings.aggregator,
            pooling=parts.pooling,
            embeddings=embeddings_of(parts.module),
        )
        self.plane = Plane(
            averaging=averaging,
            collector=Star if parts.pushed is None else partial(Arrivals, parts.pushed),
            fixed_bytes=sum(tensor.nbytes for tensor in parts.module.parameters() if not tensor.requires_grad),
            terms=Terms(quorum=settings.quorum, grace_s=settings.quorum_grace_s, on_nonfinite=settings.on_nonfinite),
        )

    def ready(self, state: RunState, latest: Callable[[], Snapshot | None]) -> Opening:
        """See `Replicas`.

        Raises:
            ReplicaLostError: a stage could not be opened now, but perhaps later.
            StateLostError: a durable state must be restored first.
        """
        self._forget_told(state)
        opening_s = 0.0
        if self._stage is None:
            self._stage = self._open(state, latest())
            opening_s = self._opening_s
        return Opening(seconds=opening_s, changed=self._changed)

    def train(self, work: RoundWork, start: Globals, ahead: RoundSpec | None = None) -> RoundResult:
        """See `Replicas`; see `Stage.train` for what is raised."""
        assert self._stage is not None
        if work.round != self._round:
            self._round, self._rounds = work.round, self._rounds + 1
        closes = self._planned is not None and self._rounds >= self._planned
        result = self._stage.train(work, start, None if closes else ahead)
        if self._keeps:
            self._kept |= {i: (kept, self._stage.name) for i, kept in self._stage.kept_rounds().items()}
        return replace(result, reset=self._reset)

    def evaluate(self, model: Globals) -> list[dict[str, Any]]:
        """See `Replicas`."""
        assert self._stage is not None
        return self._stage.evaluate(model)

    def states(self, clocks: Sequence[int]) -> list[bytes]:
        """See `Replicas`."""
        assert self._stage is not None
        return self._stage.states(clocks)

    def _open(self, state: RunState, snapshot: Snapshot | None) -> Stage:
        settings = self.parts.settings
        began = time.monotonic()
        seams.reach("slots", round_number=state.committed + 1)
        changed = self.staffing.settle(state)
        self._changed = changed or self._changed
        if changed:
            self._kept.clear()
        elif self._renew:
            self.launcher.renew()
        self._renew = False
        last = state.schedule.num_rounds
        planned = rounds_to_run(
            state.records,
            left=_MANY if last is None else last - state.committed,
            rounds_per_stage=settings.rounds_per_stage,
            max_stage_s=settings.max_stage_s,
        )
        stage = Stage(
            run=self.parts.run,
            name=secrets.token_hex(8),
            num_replicas=self.launcher.num_replicas,
            plane=self.plane,
            stall_timeout_s=settings.stall_timeout_s,
            on_beat=self.parts.on_beat,
            on_log=self.parts.on_log,
        )
        outcome = self._filled(stage, state, snapshot, stage_description(state.committed, planned, last))
        self._reset = [i for i, what in enumerate(outcome) if what == "reset" or self._changed]
        if "reset" in outcome and settings.replica_state == "durable":
            stage.abort()
            raise StateLostError(
                f"the state of replicas {self._reset} after round {state.committed} is gone with its executor; "
                "going back to the last durable snapshot."
            )
        self._opened_at = time.monotonic()
        self._opening_s = self._opened_at - began
        self._round, self._rounds, self._planned = 0, 0, planned
        return stage

    def _filled(self, stage: Stage, state: RunState, snapshot: Snapshot | None, description: str) -> list[str]:
        """Have replicas come in and build; what came of each one's state."""
        timeout_s = self.parts.settings.open_timeout_s
        self.coordinator.route(stage.admit)
        try:
            ticket = Ticket(
                address=self.coordinator.address,
                token=self.coordinator.token,
                run=self.parts.run,
                stage=stage.name,
            )
            running = self.launcher.launch(ticket, description)
            hellos = stage.gather(
                running, timeout_s=timeout_s, waiting_for=self._waiting_for, enough=self.staffing.enough
            )
            self._check(hellos, state.generation.shards)
            outcome = stage.open(self._answers(state, snapshot), timeout_s=timeout_s)
            self._settle(state, stage)
        except BaseException:
            stage.abort()
            raise
        finally:
            self.coordinator.route(None)
        return outcome

    def _settle(self, state: RunState, stage: Stage) -> None:
        """Choose once where updates are added up, and have the stage's replicas form a ring if that is how."""
        count, size = stage.num_replicas, self.parts.layout.num_bytes
        settings = self.parts.settings
        wanted = settings.aggregation
        if settings.closing:  # also where an earlier call, without these settings, chose a ring
            state.aggregation = "star"
        if wanted == "auto" and not state.aggregation:
            state.aggregation = "star"  # what a ring that cannot be formed leaves behind for the next attempt
            if self._may_ring and needs_trial(count, size):
                stage.form_ring(timeout_s=min(_RING_TRIAL_S, settings.stall_timeout_s))
                state.aggregation = choose(count, size, stage.try_both(size), outer=self.parts.wide)
        elif wanted != "auto":
            state.aggregation = wanted
        if state.aggregation == "ring":
            stage.collector = Ring
            stage.form_ring(timeout_s=settings.stall_timeout_s)

    @property
    def _may_ring(self) -> bool:
        """Whether "auto" may choose the ring."""
        parts = self.parts
        whole = not parts.differences and not codec_named(parts.local.down_codec).lossy
        return whole and not parts.settings.closing and available()

    def _answers(self, state: RunState, snapshot: Snapshot | None) -> list[tuple[Open, bytes, bytes]]:
        tensors = self.parts.fixed()
        answers = []
        for replica in range(self.launcher.num_replicas):
            sent = None
            if snapshot is not None and snapshot.round == state.committed and not state.just_dealt:
                sent = snapshot.replica(replica)
            source = "sent" if sent is not None else "fresh" if state.just_dealt else "local"
            kept_round, kept_by = self._kept.get(replica, (state.committed, ""))
            answer = Open(
                committed=state.committed,
                scheduler_steps=state.schedule.clock(state.committed, state.consumed, replica),
                state=source,
                kept_round=kept_round,
                kept_by=kept_by,
                tensor_bytes=len(tensors),
                keep=self._keeps,
            )
            answers.append((answer, tensors, sent or b""))
        return answers

    def _check(self, hellos: Sequence[Hello], shards: Sequence[ShardFacts]) -> None:
        check_versions(versions(), hellos)
        for hello, facts in zip(hellos, shards, strict=True):
            if hello.shard:
                self._renew = True
                raise ReplicaLostError(
                    f"replica {hello.replica} on {hello.host}: {hello.shard}", replica=hello.replica, host=hello.host
                )
            check_shard(hello, facts)

    def _waiting_for(self) -> str:
        return (
            f"A barrier stage needs {self.launcher.num_replicas} free slots at the same time: check that no other job holds "
            "them, that executors are up, and that num_workers is at most executors x cores / spark.task.cpus."
        )

    def rest(self, state: RunState, round_s: float | None = None) -> None:
        """See `Replicas`.

        Raises:
            SparkdeepError: the stage could not be closed; it was ended at once.
        """
        self._forget_told(state)
        if self._stage is None or (round_s is not None and not self._due(round_s)):
            return
        stage, self._stage = self._stage, None
        try:
            stage.close(save=None if self._keeps else state.committed, clocks=state.clocks())
        except BaseException:
            stage.abort()
            raise
        if not self._keeps:
            self._kept = dict.fromkeys(range(stage.num_replicas), (state.committed, stage.name))

    def _forget_told(self, state: RunState) -> None:
        """What stands in the record of a committed round is not for the next one."""
        if 0 < self._round <= state.committed:
            self._round, self._changed, self._reset = 0, "", []

    def _due(self, round_s: float) -> bool:
        open_s = time.monotonic() - self._opened_at
        longest = self.parts.settings.max_stage_s
        if open_s + round_s > longest:
            return True
        if self._planned is not None:
            return self._rounds >= self._planned
        # 20 times what opening took: opening costs at most 5 % of the time.
        return open_s >= min(longest, 20 * self._opening_s)

    @property
    def _keeps(self) -> bool:
        """Whether replicas save their state after every round."""
        return self.parts.settings.replica_state == "local"

    def discard(self) -> None:
        """End the open stage at once, whatever state it is in."""
        if self._stage is not None:
            stage, self._stage = self._stage, None
            stage.abort()
