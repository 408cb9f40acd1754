"""What the main loop needs from whatever runs the replicas of a fit, and what that is given about the fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final

from torch import nn

from sparkdeep.optim.asynchronous import Window
from sparkdeep.protocol.messages import ReplicaPlan, RoundSpec, ShardFacts
from sparkdeep.protocol.orders import Globals, RoundResult, RoundWork
from sparkdeep.rounds.run_state import RunState
from sparkdeep.rounds.snapshots import Snapshot
from sparkdeep.settings.local import LocalSettings
from sparkdeep.settings.run import RunSettings
from sparkdeep.tensors.encoding import codec_named
from sparkdeep.tensors.parameters import Layout, named_tensors
from sparkdeep.tensors.state_dicts import pack_tensors

__all__ = ["FitParts", "Opening", "Replicas", "StageOpener"]


def _ignored(_replica: int, _what: Any) -> None:
    pass


@final
@dataclass(frozen=True, kw_only=True)
class FitParts:
    """What a fit's replicas are made from and work on."""

    run: str
    """The run's id."""
    module: nn.Module
    """Its model holds the starting parameters."""
    layout: Layout
    local: LocalSettings
    settings: RunSettings
    plan: ReplicaPlan
    shards: Sequence[ShardFacts]
    """Rows and digest of each shard, one per replica."""
    wide: bool
    """Whether the outer step wants the mean in float64."""
    window: Window | None = None
    """How an asynchronous run takes in pushes; None: its rounds are synchronous."""
    on_beat: Callable[[int, int], None] = field(default=_ignored)
    """Called with (replica, rows of the round so far)."""
    on_log: Callable[[int, str], None] = field(default=_ignored)
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
