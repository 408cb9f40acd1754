"""What the loop works on: one fit's settings, state and parts, and what is due next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

from sparkdeep.optim.gradient_rounds import Evaluations
from sparkdeep.optim.outer import OuterOptimizer
from sparkdeep.rounds.guards import FailureLedger
from sparkdeep.rounds.run_state import RunState
from sparkdeep.rounds.snapshots import Snapshots
from sparkdeep.rounds.transport import Replicas
from sparkdeep.settings.local import LocalSettings
from sparkdeep.settings.run import RunSettings
from sparkdeep.tensors.encoding import codec_named
from sparkdeep.tensors.parameters import Layout
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
    """Where durable states go; None: `replica_state="local"` without a checkpoint."""
    pending: RoundRecord | None = None
    """A committed round that is not validated or kept yet."""
    epoch_ended: bool = False
    """Whether the pending round was the last of its epoch."""
    wanted: bool = False
    """Whether a checkpoint was asked for, out of turn."""
    told: bool = False
    """Whether the pending round was yielded already, and only its checkpoint is missing."""
    ledger: FailureLedger = field(init=False)
    """What has failed."""
    rolled_back: int = 0
    """Rounds in a row that counted nobody (`on_nonfinite="rollback"`)."""
    replay: Mapping[int, RoundRecord] = field(default_factory=dict)
    """Rounds of an earlier run whose decisions are taken again: who counted, and how many steps each took."""
    furthest: int = 0
    sleep: Callable[[float], None] = field(default=time.sleep)
    evaluations: Evaluations | None = None
    """Of gradient rounds, whose outer step may ask for several a round."""

    def __post_init__(self) -> None:
        self.ledger = FailureLedger(max_retries=self.settings.max_retries)

    @property
    def overlap(self) -> bool:
        """Whether a round may begin before the one before it is committed."""
        return bool(self.local.overlap)

    @property
    def base(self) -> Literal["start", "global"] | None:
        """What the mean of updates is added to: with `overlap` they tell of progress, with a lossy codec of a change."""
        if self.overlap:
            return "global"
        return "start" if codec_named(self.local.codec).lossy else None
