"""Who starts replicas, and how many: all that were asked for, or, where allowed, as many as there are slots for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, final

from sparkdeep.errors import ReplicaLostError
from sparkdeep.protocol.messages import ShardFacts, Ticket
from sparkdeep.rounds.run_state import RunState
from sparkdeep.settings.run import LocalSettings, RunSettings

__all__ = ["Launcher", "RunningStage", "Staffing"]

_LOG = logging.getLogger("sparkdeep")
_LOOK_EVERY_S: Final = 0.25


class RunningStage(Protocol):
    """Replicas on their way to the coordinator, or at work."""

    def failure(self) -> BaseException | None:
        """Why the stage failed, as far as its launcher knows; None while it runs or after it ended well."""

    def finish(self, timeout_s: float) -> None:
        """Wait for the replicas to end after they were told to stop; cancels what is left."""

    def cancel(self) -> None:
        """End the replicas now; returns at once."""


class Launcher(Protocol):
    """Starts one replica per shard."""

    @property
    def num_replicas(self) -> int:
        """How many."""

    def launch(self, ticket: Ticket, description: str) -> RunningStage:
        """Start all replicas; each dials the ticket's address and says hello."""

    def renew(self) -> None:
        """Make the shards anew before the next launch: a replica did not find its own."""

    def slots(self) -> int | None:
        """How many replicas could run at the same time, whether their slots are busy or not; None where nobody knows."""

    def resize(self, num_replicas: int) -> Sequence[ShardFacts]:
        """Deal the rows anew, to so many replicas; what their shards hold.

        Raises:
            ReplicaLostError: it could not be done now, but perhaps later.
        """


@final
@dataclass(kw_only=True)
class Staffing:
    """Waits for slots before a stage is launched, and deals the rows anew when the number of replicas changes."""

    launcher: Launcher
    shards: Sequence[ShardFacts]
    """What the launcher's shards hold."""
    local: LocalSettings
    settings: RunSettings
    clock: Callable[[], float] = field(default=time.monotonic)
    sleep: Callable[[float], None] = field(default=time.sleep)

    def settle(self, state: RunState) -> str:
        """Have shards for as many replicas as can run now.

        With `min_workers`, a lost executor's replacement is waited for `replacement_timeout_s`; then the run goes on with
        as many replicas as there are slots for, and with all of them again once there are. New replicas begin where the
        run is: with the same share of the epoch behind them, and with fresh optimizers.

        Returns:
            Such as "3 -> 2" where the number changed, else "".

        Raises:
            ReplicaLostError: too few slots for `open_timeout_s`; the message counts them.
        """
        count = self._available()
        if count != self.launcher.num_replicas or count != len(self.shards):  # the last attempt at it may have failed
            _LOG.warning("the rows are dealt anew to %d replicas in place of %d", count, self.launcher.num_replicas)
            self.shards = self.launcher.resize(count)
        before = state.generation.num_replicas
        if before == count:
            return ""
        # Also when a checkpoint goes on that was written with another number.
        state.deal(self.shards, self.local, self.settings)
        return f"{before} -> {count}"

    def enough(self) -> bool:
        """Whether there are slots for the present replicas, as far as anybody knows."""
        slots = self.launcher.slots()
        return slots is None or slots >= self.launcher.num_replicas

    def _available(self) -> int:
        """The number of replicas that there are slots for, as soon as they are enough."""
        settings = self.settings
        began = self.clock()
        while (slots := self.launcher.slots()) is not None and slots < settings.num_workers:
            waited = self.clock() - began
            # Fewer than before: a replacement may be on its way. As many, or more: it has been waited for.
            settled = slots >= self.launcher.num_replicas or waited >= settings.replacement_timeout_s
            if settings.min_workers is not None and slots >= settings.min_workers and settled:
                return slots
            if waited >= settings.open_timeout_s:
                raise ReplicaLostError(self._too_few(slots))
            self.sleep(_LOOK_EVERY_S)
        return settings.num_workers if slots is not None else self.launcher.num_replicas

    def _too_few(self, slots: int) -> str:
        wanted, least = self.settings.num_workers, self.settings.min_workers
        return (
            f"the session has {slots} of the {wanted} slots that num_workers={wanted} needs at the same time, and no more came "
            f"within open_timeout_s={self.settings.open_timeout_s:g} s: an executor or its host is gone. Bring it back and make "
            "the same call again (with checkpoint_dir it goes on where it was), lower num_workers, "
            + (
                f"or lower min_workers={least}."
                if least is not None
                else "or allow the run to go on with fewer by min_workers=."
            )
        )
