"""What the loop works on: one fit's settings, state and parts, and what is due next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

from torch import Tensor

from sparkdeep.optim.gradient_rounds import Evaluations
from sparkdeep.optim.outer import OuterOptimizer
from sparkdeep.protocol.messages import RoundSpec
from sparkdeep.rounds.guards import FailureLedger
from sparkdeep.rounds.run_state import RunState
from sparkdeep.rounds.transport import Replicas, Snapshot, Snapshots
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.tensors.encoding import codec_named
from sparkdeep.tensors.parameters import Layout
from sparkdeep.tensors.pooling import Pooling
from sparkdeep.tracking.records import RoundRecord

__all__ = ["Run"]


@final
@dataclass(kw_only=True)
class Run:
    """What a fit is, for the loop."""

    settings: RunSettings
    local: LocalSettings
    layout: Layout
    state: RunState
    outer: OuterOptimizer
    replicas: Replicas
    metrics: Mapping[str, Any]
    validate: bool
    """Whether there are validation rows."""
    snapshots: Snapshots | None
    """Where durable states are kept; None: `replica_state="local"` without a checkpoint."""
    pending: RoundRecord | None = None
    """A committed round that is not yet validated or kept."""
    epoch_ended: bool = False
    """Whether the pending round was the last of its epoch."""
    checkpoint_asked: bool = False
    """Whether a checkpoint was requested, out of turn."""
    yielded: bool = False
    """Whether the pending round has been yielded, and only its checkpoint is missing."""
    ledger: FailureLedger = field(init=False)
    """What has failed."""
    rolled_back: int = 0
    """Rounds in a row that counted nobody (`on_nonfinite="rollback"`)."""
    replay: Mapping[int, RoundRecord] = field(default_factory=dict)
    """Rounds of an earlier run whose decisions are repeated: which replicas counted, and how many steps each took."""
    furthest: int = 0
    sleep: Callable[[float], None] = field(default=time.sleep)
    evaluations: Evaluations | None = None
    """Evaluations of gradient rounds, whose outer step may ask for several per round."""

    pooling: Pooling = field(default_factory=Pooling)
    """What replicas' state beside the parameters becomes."""
    renormalize: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    """Fits state to the moved parameters; None where none depends on them."""
    warned: bool = False
    """Whether state without a rule was named."""

    def __post_init__(self) -> None:
        self.ledger = FailureLedger(max_retries=self.settings.max_retries)

    @property
    def overlap(self) -> bool:
        """Whether a round may begin before the one before it is committed."""
        return bool(self.local.overlap)

    @property
    def base(self) -> Literal["start", "global"] | None:
        """What the mean of updates is added to: updates are progress with `overlap`, changes with a lossy codec."""
        if self.overlap:
            return "global"
        return "start" if codec_named(self.local.codec).lossy else None

    @property
    def over(self) -> bool:
        """Whether no round is left to train."""
        return bool(self.state.stopped) or self.state.specs() is None

    def latest(self) -> Snapshot | None:
        """The newest durable state."""
        return self.snapshots.latest() if self.snapshots is not None else None

    @property
    def validation_due(self) -> bool:
        """Whether the pending round is to be validated."""
        if not self.validate or self.pending is None or self.pending.metrics:
            return False
        return self._validates_at(self.state.committed, epoch_ended=self.epoch_ended) or self.over

    @property
    def snapshot_due(self) -> bool:
        """Whether the pending round is to be kept."""
        if self.snapshots is None or self.pending is None or self.pending.checkpoint_bytes:
            return False
        return self._snapshot_at(self.state.committed) or self.over

    def owes_checkpoint(self) -> bool:
        """Whether the round that was just yielded is to be kept, out of turn, before the next one begins."""
        if self.pending is not None and self.pending.checkpoint_bytes:
            self.checkpoint_asked = False
        # With `overlap` replicas are in the next round by now: the checkpoint is of that one.
        return self.checkpoint_asked and not self.yielded and not self.overlap

    def ahead(self, spec: RoundSpec) -> RoundSpec | None:
        """The round that replicas may begin before that of `spec` is committed: the next one, unless something is due before it."""
        if not self.overlap:
            return None
        state = self.state
        ends_epoch = state.schedule.epochs_done(spec.round, state.consumed) > state.epochs_done()
        if self._validates_at(spec.round, epoch_ended=ends_epoch) or self._snapshot_at(spec.round):
            return None
        return state.schedule.next(spec.round)

    def _validates_at(self, committed: int, *, epoch_ended: bool) -> bool:
        if not self.validate:
            return False
        every = self.settings.validate_every
        return epoch_ended if every == "epoch" else committed % every == 0

    def _snapshot_at(self, committed: int) -> bool:
        asked = self.checkpoint_asked or committed % self.settings.checkpoint_every == 0
        return self.snapshots is not None and asked
