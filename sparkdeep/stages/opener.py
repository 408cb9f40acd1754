"""When stages open and close, and with which replica states they begin."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, final

from sparkdeep import seams
from sparkdeep.errors import ReplicaLostError, SparkdeepError
from sparkdeep.protocol.messages import Hello, Open
from sparkdeep.protocol.plans import ShardFacts, Ticket
from sparkdeep.protocol.refusals import check_shard, check_versions
from sparkdeep.rounds.planning import rounds_to_run, stage_description
from sparkdeep.rounds.run_state import RunState
from sparkdeep.rounds.snapshots import Snapshot
from sparkdeep.settings.run import RunSettings
from sparkdeep.stages.coordinator import Coordinator
from sparkdeep.stages.gathering import Plane
from sparkdeep.stages.launch import Launcher
from sparkdeep.stages.ring import choose, needs_trial
from sparkdeep.stages.staffing import Staffing
from sparkdeep.stages.stage import Stage
from sparkdeep.versions import versions

__all__ = ["Stages", "StateLostError"]


# A ring is only tried: where executors cannot reach each other, the star is taken after this long.
_RING_TRIAL_S: Final = 30.0
# Rounds that are left where nobody knows.
_MANY: Final = 1 << 30


class StateLostError(ReplicaLostError):
    """A replica's state is gone although it was promised durable: the run goes back to the last snapshot."""


@final
@dataclass(kw_only=True)
class Stages:
    """Opens a stage when a round needs one, and closes it when it is due."""

    launcher: Launcher
    """Who starts replicas."""
    staffing: Staffing
    """How many of them."""
    coordinator: Coordinator
    """Where they dial in."""
    run: str
    """The run's id."""
    settings: RunSettings
    plane: Plane
    """How parameters travel."""
    tensors: Callable[[], bytes]
    """The parameters that do not travel with every round, as `trees.pack_tensors`; b"" when there are none."""
    ring_possible: bool
    """Whether "auto" may choose the ring."""
    keep: bool
    """Whether replicas save their state after every round."""
    on_beat: Callable[[int, int], None]
    on_log: Callable[[int, str], None]
    last_opening_s: float = field(default=0.0, init=False)
    """What opening the stage took, if the last call of `current` opened one."""
    _change: str = field(default="", init=False)
    """Such as "3 -> 2" where the number of replicas changed since a round was counted."""
    _stage: Stage | None = field(default=None, init=False)
    _opened_at: float = field(default=0.0, init=False)
    _opening_s: float = field(default=0.0, init=False)
    _rounds: int = field(default=0, init=False)
    _planned: int | None = field(default=None, init=False)
    _renew: bool = field(default=False, init=False)
    _kept: dict[int, tuple[int, str]] = field(default_factory=dict, init=False)
    """Replica -> round and stage of the state on its executor's disk that counts."""
    _reset: list[int] = field(default_factory=list, init=False)

    def current(self, state: RunState, latest: Callable[[], Snapshot | None]) -> Stage:
        """The open stage; opens one if there is none.

        Raises:
            ReplicaLostError: it could not be opened now, but perhaps later.
            StateLostError: a durable state must be restored first.
        """
        self.last_opening_s = 0.0
        if self._stage is None:
            self._stage = self._open(state, latest())
        return self._stage

    def _open(self, state: RunState, snapshot: Snapshot | None) -> Stage:
        began = time.monotonic()
        seams.reach("slots", round_number=state.committed + 1)
        changed = self.staffing.settle(state)
        self._change = changed or self._change
        if changed:
            self._kept.clear()
        elif self._renew:
            self.launcher.renew()
        self._renew = False
        name = secrets.token_hex(8)
        last = state.schedule.num_rounds
        planned = rounds_to_run(
            state.records,
            left=_MANY if last is None else last - state.committed,
            rounds_per_stage=self.settings.rounds_per_stage,
            max_stage_s=self.settings.max_stage_s,
        )
        stage = Stage(
            run=self.run,
            name=name,
            num_replicas=self.launcher.num_replicas,
            plane=self.plane,
            stall_timeout_s=self.settings.stall_timeout_s,
            on_beat=self.on_beat,
            on_log=self.on_log,
        )
        self.coordinator.route(stage.admit)
        try:
            ticket = Ticket(address=self.coordinator.address, token=self.coordinator.token, run=self.run, stage=name)
            running = self.launcher.launch(ticket, stage_description(state.committed, planned, last))
            hellos = stage.gather(
                running,
                timeout_s=self.settings.open_timeout_s,
                waiting_for=self._waiting_for,
                enough=self.staffing.enough,
            )
            self._check(hellos, state.generation.shards)
            outcome = stage.open(self._answers(state, snapshot), timeout_s=self.settings.open_timeout_s)
            self._settle(state, stage)
        except BaseException:
            stage.abort()
            raise
        finally:
            self.coordinator.route(None)
        self._reset = [i for i, what in enumerate(outcome) if what == "reset" or self._change]
        if "reset" in outcome and self.settings.replica_state == "durable":
            stage.abort()
            raise StateLostError(
                f"the state of replicas {self._reset} after round {state.committed} is gone with its executor; "
                "going back to the last durable snapshot."
            )
        self._opened_at = time.monotonic()
        self._opening_s = self.last_opening_s = self._opened_at - began
        self._rounds, self._planned = 0, planned
        return stage

    def _settle(self, state: RunState, stage: Stage) -> None:
        """Choose once where updates are added up, and have the stage's replicas form a ring if that is how."""
        count, size = stage.num_replicas, self.plane.layout.num_bytes
        wanted = self.settings.aggregation
        if self.settings.closing:  # also where an earlier call, without these settings, chose a ring
            state.aggregation = "star"
        if wanted == "auto" and not state.aggregation:
            state.aggregation = "star"  # what a ring that cannot be formed leaves behind for the next attempt
            if self.ring_possible and needs_trial(count, size):
                stage.form_ring(timeout_s=min(_RING_TRIAL_S, self.settings.stall_timeout_s))
                state.aggregation = choose(count, size, stage.try_both(size), outer=self.plane.wide)
        elif wanted != "auto":
            state.aggregation = wanted
        self.plane.ring = state.aggregation == "ring"
        if self.plane.ring:
            stage.form_ring(timeout_s=self.settings.stall_timeout_s)

    def _answers(self, state: RunState, snapshot: Snapshot | None) -> list[tuple[Open, bytes, bytes]]:
        tensors = self.tensors()
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
                keep=self.keep,
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

    def take_change(self) -> str:
        """Such as "3 -> 2" where the number of replicas changed since this was asked last; else ""."""
        change, self._change = self._change, ""
        return change

    def committed_round(self) -> list[int]:
        """Count a round of the open stage; returns the replicas whose state was lost before it, told once."""
        self._rounds += 1
        if self.keep:
            assert self._stage is not None
            self._kept |= {i: (kept, self._stage.name) for i, kept in self._stage.kept_rounds().items()}
        reset, self._reset = self._reset, []
        return reset

    def last_planned(self) -> bool:
        """Whether the stage is known to close after the round that is due next."""
        return self._planned is not None and self._rounds + 1 >= self._planned

    def due(self, round_s: float) -> bool:
        """Whether the stage should close now, the next round being about as long as the last."""
        open_s = time.monotonic() - self._opened_at
        longest = self.settings.max_stage_s
        if open_s + round_s > longest:
            return True
        if self._planned is not None:
            return self._rounds >= self._planned
        # 20 times what opening took: opening costs at most 5 % of the time.
        return open_s >= min(longest, 20 * self._opening_s)

    def close(self, state: RunState) -> None:
        """Close the open stage in good order, if there is one; the replicas keep their state as that of the committed round.

        Raises:
            SparkdeepError: it could not be closed; the caller discards it.
        """
        if self._stage is None:
            return
        stage, self._stage = self._stage, None
        try:
            stage.close(save=None if self.keep else state.committed, clocks=state.clocks())
            if not self.keep:
                self._kept = dict.fromkeys(range(stage.num_replicas), (state.committed, stage.name))
        except SparkdeepError:
            stage.abort()
            raise
        except BaseException:
            stage.abort()
            raise

    def discard(self) -> None:
        """End the open stage at once, whatever state it is in."""
        if self._stage is not None:
            stage, self._stage = self._stage, None
            stage.abort()
