"""What stands between the main loop and whatever runs a fit's replicas: their interface, stages planned, snapshots to go back to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, final

from torch import nn

from sparkdeep.optim.asynchronous import OnArrival
from sparkdeep.protocol.messages import ReplicaPlan, RoundSpec, ShardFacts
from sparkdeep.protocol.orders import Globals, RoundResult, RoundWork
from sparkdeep.rounds.run_state import RunState
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.storage.checkpoints import CheckpointDirectory, Loaded
from sparkdeep.tensors.encoding import codec_named
from sparkdeep.tensors.parameters import Layout, named_tensors
from sparkdeep.tensors.pooling import Pooling
from sparkdeep.tensors.state_dicts import pack_tensors
from sparkdeep.tracking.records import RoundRecord

__all__ = [
    "CheckpointSnapshots",
    "FitParts",
    "MemorySnapshots",
    "Opening",
    "Replicas",
    "Snapshot",
    "Snapshots",
    "StageOpener",
    "job_description",
    "rounds_to_run",
    "stage_description",
]

# Opening costs at most 5 % of the time if 20 times its cost follows it; a quarter more, because rounds vary.
_WORK_PER_OPENING: Final = 25.0
# As above: the rest of max_stage_s is for rounds that take longer than those before.
_SHARE_OF_STAGE: Final = 0.9


@final
@dataclass(frozen=True, kw_only=True)
class FitParts:
    """What a fit's replicas are made from and work on."""

    run: str
    """The run's id."""
    module: nn.Module
    """Its model holds the starting parameters."""
    layout: Layout
    pooling: Pooling
    local: LocalSettings
    settings: RunSettings
    plan: ReplicaPlan
    shards: Sequence[ShardFacts]
    """Rows and digest of each shard, one per replica."""
    wide: bool
    """Whether the outer step wants the mean in float64."""
    pushed: OnArrival | None
    """What an asynchronous run moves by its pushes; None: its rounds are synchronous."""
    on_beat: Callable[[int, int], None]
    """Called with (replica, rows of the round so far)."""
    on_log: Callable[[int, str], None]
    """Called with (replica, line) for what replicas print."""

    @property
    def differences(self) -> bool:
        """Whether updates are differences: with `overlap` they are progress, with a lossy codec they are changes."""
        return bool(self.local.overlap) or codec_named(self.local.codec).lossy

    def fixed(self) -> bytes:
        """The parameters that do not travel with every round, as `pack_tensors`; b"" when there are none."""
        moving = {entry.name for entry in self.layout.entries} | set(self.layout.buffers)
        tensors = {name: tensor for name, tensor in named_tensors(self.module) if name not in moving}
        return pack_tensors(tensors) if tensors else b""


@final
@dataclass(frozen=True, kw_only=True)
class Opening:
    """How the replicas became ready."""

    seconds: float = 0.0
    """Seconds that opening their stage took, if one was opened just now."""
    changed: str = ""
    """Such as "3 -> 2" where their number changed since a round was counted."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A durable state: what `RunState.to_files` gave after a round."""

    round: int
    files: Mapping[str, bytes]

    def replica(self, number: int) -> bytes | None:
        """A replica's state, or None when none is in the snapshot (round 0)."""
        name = f"replica-{number:05d}.safetensors"
        return self.files[name] if name in self.files else None  # noqa: SIM401 (files may be read lazily)


class Snapshots(Protocol):
    """Where durable states are kept."""

    def save(self, snapshot: Snapshot) -> None:
        """Keep `snapshot`, durably on return."""

    def latest(self) -> Snapshot | None:
        """The newest one, or None."""


@final
class MemorySnapshots:
    """Keeps the newest snapshot in the driver's memory: as durable as the driver."""

    def __init__(self) -> None:
        self._latest: Snapshot | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Replace the previous one."""
        self._latest = snapshot

    def latest(self) -> Snapshot | None:
        """The newest one."""
        return self._latest


@final
class CheckpointSnapshots:
    """Snapshots in a checkpoint directory: as durable as what lies beneath it."""

    def __init__(self, directory: CheckpointDirectory) -> None:
        self._directory = directory

    def begin(self, *, resume: bool) -> Snapshot | None:
        """Become the directory's writer; returns its newest checkpoint, None without one to resume."""
        if not resume:
            self._directory.discard()
            return None
        return _snapshot(self._directory.begin())

    def save(self, snapshot: Snapshot) -> None:
        """Commit a checkpoint."""
        self._directory.save(snapshot.round, snapshot.files, {"round": snapshot.round})

    def latest(self) -> Snapshot | None:
        """The newest checkpoint that verifies."""
        return _snapshot(self._directory.latest())


def _snapshot(loaded: Loaded | None) -> Snapshot | None:
    return None if loaded is None else Snapshot(round=loaded.round_number, files=loaded.files)


class Replicas(Protocol):
    """The replicas of a fit, whether a stage is open or not."""

    def ready(self, state: RunState, latest: Callable[[], Snapshot | None]) -> Opening:
        """Have the replicas wait for work, with their state of the committed round; opens a stage if none is open.

        Args:
            state: of the run; its rows are dealt anew where the number of replicas changes.
            latest: gives the newest durable state.

        Raises:
            ReplicaLostError: that failed, and may succeed later.
        """

    def train(self, work: RoundWork, start: Globals, ahead: RoundSpec | None = None) -> RoundResult:
        """Run one round: the updates that count are in the result, or it raises and none counts.

        Replicas may begin the round `ahead` meanwhile; what they did of it is undone if the next order is another one.
        """

    def evaluate(self, model: Globals) -> list[dict[str, Any]]:
        """Score the global parameters on every replica's validation rows; one result a replica, in order."""

    def states(self, clocks: Sequence[int]) -> list[bytes]:
        """Every replica's optimizer, clock and random state, in order; `clocks`: steps of their learning-rate schedules."""

    def rest(self, state: RunState, round_s: float | None = None) -> None:
        """Close the stage in good order if it is due; the replicas keep their state as that of the committed round.

        Args:
            state: of the run.
            round_s: about how long the next round takes; None: close it in any case.
        """

    def discard(self) -> None:
        """End an open stage at once, whatever its state."""


class StageOpener(Protocol):
    """How the replicas of a fit are reached: what a `Fit` is given."""

    def replicas(self, parts: FitParts) -> Replicas:
        """The replicas of a fit; nothing is opened yet."""


def rounds_to_run(
    records: Sequence[RoundRecord], *, left: int, rounds_per_stage: int | Literal["auto"], max_stage_s: float
) -> int | None:
    """Decide how many rounds the next stage runs.

    Args:
        records: of the run so far; the last stage's rounds show how long a round takes, and its first what opening costs.
        left: rounds of the run that are not committed yet; 0 when a stage is opened only to score or keep the last one.
        rounds_per_stage: the setting.
        max_stage_s: the setting: a stage is planned to fit into it, unless a single round does not.

    Returns:
        At most `left`, and at least 1 if `left` is; None for "auto" when nothing was measured yet and several rounds
        are left: such a stage is closed by the clock.
    """
    measured = _last_stage(records)
    limit = left if rounds_per_stage == "auto" else min(rounds_per_stage, left)
    if measured is None:
        return None if rounds_per_stage == "auto" and left > 1 else limit
    round_s, opening_s = measured
    limit = min(limit, max(1, int(_SHARE_OF_STAGE * max_stage_s / round_s)))
    if rounds_per_stage == "auto":
        limit = min(limit, max(1, math.ceil(_WORK_PER_OPENING * opening_s / round_s)))
    return limit


def stage_description(committed: int, planned: int | None, num_rounds: int | None) -> str:
    """What the Spark UI shows of a stage's job."""
    first, of = committed + 1, _of(num_rounds)
    if planned is None:
        return f"sparkdeep fit: rounds from {first}{of}"
    if planned == 0:
        return f"sparkdeep fit: scores and checkpoint of round {committed}{of}"
    return f"sparkdeep fit: rounds {first}-{committed + planned}{of}"


def job_description(what: str, committed: int, num_rounds: int | None) -> str:
    """What the Spark UI shows of a job between rounds."""
    return f"sparkdeep fit: {what} after round {committed}{_of(num_rounds)}"


def _of(num_rounds: int | None) -> str:
    return "" if num_rounds is None else f" of {num_rounds}"


def _last_stage(records: Sequence[RoundRecord]) -> tuple[float, float] | None:
    """Mean seconds of a round, and of opening, in the last stage; None if none was opened."""
    for start in range(len(records) - 1, -1, -1):
        opening_s = records[start].stage_seconds
        if opening_s > 0:
            rounds = records[start:]
            round_s = (sum(record.seconds for record in rounds) - opening_s) / len(rounds)
            return max(round_s, 1e-6), opening_s
    return None
