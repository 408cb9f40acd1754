"""What the main loop needs of a transport: something that opens stages, and a stage that trains, scores and tells states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from sparkdeep.protocol.messages import Hello
from sparkdeep.protocol.plans import RoundSpec
from sparkdeep.protocol.values import Globals, RoundResult, RoundWork
from sparkdeep.rounds.run_state import RunState
from sparkdeep.rounds.snapshots import Snapshot

__all__ = ["OpenStage", "StageOpener"]


class OpenStage(Protocol):
    """Replicas that wait for work."""

    @property
    def hellos(self) -> Mapping[int, Hello]:
        """Who they are, by replica."""

    def train(self, work: RoundWork, start: Globals, ahead: RoundSpec | None = None) -> RoundResult:
        """Run one round: the updates that count are in the result, or it raises and none counts.

        Replicas may begin the round `ahead` meanwhile; what they did of it is undone if the next order is another one.
        """

    def evaluate(self, model: Globals) -> list[dict[str, Any]]:
        """Score the global parameters on every replica's validation rows; one result a replica, in order."""

    def states(self, clocks: Sequence[int]) -> list[bytes]:
        """Every replica's optimizer, clock and random state, in order; `clocks`: steps of their learning-rate schedules."""


class StageOpener(Protocol):
    """Opens a stage when a round needs one, and closes it when it is due."""

    @property
    def last_opening_s(self) -> float:
        """What opening the stage took, if the last call of `current` opened one."""

    def take_change(self) -> str:
        """Such as "3 -> 2" where the number of replicas changed since this was asked last; else ""."""

    def current(self, state: RunState, latest: Callable[[], Snapshot | None]) -> OpenStage:
        """The open stage; opens one if there is none."""

    def committed_round(self) -> list[int]:
        """Count a round; returns the replicas whose state was lost before it, told once."""

    def last_planned(self) -> bool:
        """Whether the stage is known to close after the round that is due next."""

    def due(self, round_s: float) -> bool:
        """Whether the stage should close now, the next round being about as long as the last."""

    def close(self, state: RunState) -> None:
        """Close the open stage in good order, if there is one."""

    def discard(self) -> None:
        """End the open stage at once, whatever state it is in."""
