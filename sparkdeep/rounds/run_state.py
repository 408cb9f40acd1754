"""Everything the next round depends on, as one value that can be kept, restored and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor

from sparkdeep.checks import misfit
from sparkdeep.errors import CheckpointError, DataError
from sparkdeep.optim.drift import CONTROL
from sparkdeep.optim.local_work import Clock
from sparkdeep.protocol.messages import Position, RoundSpec, ShardFacts
from sparkdeep.protocol.orders import Globals, RoundResult
from sparkdeep.rounds.downlink import Downlink
from sparkdeep.rounds.generation import AnySchedule, Generation
from sparkdeep.rounds.inner_rates import InnerRates
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.tensors.parameters import Layout, unlike
from sparkdeep.tensors.state_dicts import pack, unpack_dict
from sparkdeep.tracking.records import RoundRecord

__all__ = ["Best", "RunState"]


# Some 10 MB; a window of an epoch may have an arrival for every local step.
_MOST_ARRIVALS: Final = 100_000


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best validated round so far."""

    round: int
    score: float
    parameters: Tensor
    buffers: dict[str, Tensor]


@dataclass(kw_only=True)
class RunState:
    """The state of a run after its committed rounds."""

    parameters: Tensor
    """The global parameters, (numel,); always the same memory, since the outer optimizer holds views of it."""
    buffers: dict[str, Tensor]
    generation: Generation
    """The present replicas, and the rounds before them."""
    consumed: list[int]
    """Steps that each of them has taken since the run began, where it keeps a clock of its own (`time_budget_s`)."""
    rates: InnerRates
    """The inner learning rate by local steps."""
    steady: frozenset[str] | None = None
    """Names of state that is always there, in one shape; None: all that there is at first."""
    sections: list[str] = field(default_factory=list)
    """Names of averaged optimizer state."""
    inner: Tensor = field(default_factory=lambda: torch.empty(0))
    """(len(sections) * numel,): averaged optimizer state."""
    downlink: Downlink | None = None
    """What replicas know of the parameters, where that differs from the parameters themselves."""
    aggregation: str = ""
    """"star" or "ring", once it has been chosen."""
    committed: int = 0
    """The records of the rounds that count."""
    best: Best | None = None
    stale: int = 0
    """Validations since the best one."""
    stopped: str = ""
    """Why the run is over before its last round; "" while it is not."""
    records: list[RoundRecord] = field(default_factory=list)
    sync_every: int | Literal["epoch"] = "epoch"
    """What a rule for the length of rounds starts from."""

    @property
    def schedule(self) -> AnySchedule:
        """The rounds of the present replicas."""
        return self.generation.schedule

    def specs(self) -> tuple[RoundSpec, ...] | None:
        """The next round, by replica; None when the run is over."""
        return self.schedule.specs(self.committed, self.consumed, self._clock())

    def _clock(self) -> Clock:
        epoch = max(self.generation.steps)
        return Clock(
            step=max(self.clocks()),
            steps_per_epoch=epoch,
            sync_every=epoch if self.sync_every == "epoch" else min(self.sync_every, epoch),
            rate=self.rates.at,
            highest=self.rates.highest,
            records=self.records,
        )

    def epochs_done(self) -> int:
        """Finished epochs."""
        return self.schedule.epochs_done(self.committed, self.consumed)

    def clocks(self) -> list[int]:
        """Steps of each replica's learning-rate schedule so far."""
        count = self.generation.num_replicas
        return [self.schedule.clock(self.committed, self.consumed, replica) for replica in range(count)]

    def take_inner(self, result: RoundResult, dtype: torch.dtype) -> None:
        """Take over averaged optimizer state, or the common control variate, of a round.

        In a round without some replica, the mean is of the others' control variates only, and would pull towards them:
        the previous mean stays until all have trained again (Karimireddy et al. 2020 move it by the others' share of
        all replicas).
        """
        if CONTROL in result.sections and not all(update.weight > 0 for update in result.updates):
            return
        # A copy: the next round's mean is written over this one's.
        self.sections, self.inner = result.sections, result.inner.to(dtype, copy=True)

    def add_record(self, record: RoundRecord) -> None:
        """Add a round's record. Only the newest asynchronous windows keep all their arrivals."""
        self.records.append(record)
        kept = 0
        for i in range(len(self.records) - 1, -1, -1):
            one = self.records[i]
            if not one.arrivals:
                break
            kept += len(one.arrivals)
            if kept > _MOST_ARRIVALS and one is not record:
                self.records[i] = replace(one, arrivals=[])

    @property
    def just_dealt(self) -> bool:
        """Whether the present replicas have yet to train a round."""
        return self.committed == self.generation.began

    def deal(self, shards: Sequence[ShardFacts], local: LocalSettings, settings: RunSettings) -> None:
        """Go on with other shards; the same share of the epoch counts as seen in each of them."""
        start = Position(round=self.committed, epoch=self.epochs_done(), step=0)
        share = self.schedule.share_of_epoch(self.committed, self.consumed)
        self.generation = Generation.over(shards, local, settings, start, share)
        self.consumed = list(self.generation.consumed)

    def starting(self, *, base: Literal["start", "global"] | None = None) -> Globals:
        """What replicas start the next round from.

        Args:
            base: what the mean of updates is added to where they are differences: what replicas started from, or the
                global parameters; None where they are not.
        """
        down = self.downlink
        return Globals(
            parameters=self.parameters if down is None else down.current,
            buffers=self.buffers,
            sections=self.sections,
            inner=self.inner,
            encoded=None if down is None else down.encoded,
            previous=None if down is None else down.previous,
            base=None
            if base is None
            else self.parameters.detach()
            if base == "global" or down is None
            else down.current,
        )

    def globals(self) -> Globals:
        """The global parameters themselves."""
        return Globals(parameters=self.parameters, buffers=self.buffers, sections=self.sections, inner=self.inner)

    def to_files(self, layout: Layout, outer: Mapping[str, Any], replicas: list[bytes]) -> dict[str, bytes]:
        """The state as named byte strings; the weights are in a safetensors file of their own."""
        weights = dict(zip([e.name for e in layout.entries], layout.views(self.parameters), strict=True))
        run = {
            "generation": self.generation.to_json(),
            "consumed": self.consumed,
            "committed": self.committed,
            "stale": self.stale,
            "stopped": self.stopped,
            "sections": self.sections,
            "inner": self.inner,
            "buffers": self.buffers,
            "best": None if self.best is None else vars(self.best),
            "outer": dict(outer),
            "aggregation": self.aggregation,
            "downlink": self.downlink.state_dict() if self.downlink is not None else None,
            "records": [record.to_dict() for record in self.records],
        }
        files = {"parameters.safetensors": pack(weights), "run.safetensors": pack(run)}
        for i, state in enumerate(replicas):
            files[f"replica-{i:05d}.safetensors"] = state
        return files

    def restore(
        self, layout: Layout, files: Mapping[str, bytes], local: LocalSettings, settings: RunSettings
    ) -> dict[str, Any]:
        """Go back to what `to_files` gave; returns the outer optimizer's state dict.

        Args:
            layout: of the model.
            files: of the snapshot.
            local: settings of the fit, as its replicas know them.
            settings: as the driver knows them; `epochs` may have grown.

        Raises:
            CheckpointError: a file is missing or damaged, or of another model; nothing was changed.
        """
        weights, run, best, records = self._read(layout, files)
        generation = Generation.from_json(run["generation"], local, settings)
        if len(run["consumed"]) != generation.num_replicas:
            raise CheckpointError(
                f"a checkpoint is damaged: steps of {len(run['consumed'])} replicas, of which there were {generation.num_replicas}"
            )
        with torch.no_grad():
            for entry, view in zip(layout.entries, layout.views(self.parameters.detach()), strict=True):
                view.copy_(weights[entry.name])
        self.generation, self.consumed = generation, list(run["consumed"])
        self.buffers = run["buffers"]
        self.sections, self.inner = run["sections"], run["inner"]
        self.committed, self.stale, self.stopped = run["committed"], run["stale"], run["stopped"]
        self.aggregation = run["aggregation"]
        if self.downlink is not None:
            self.downlink.load_state_dict(run["downlink"] or {"current": None, "previous": None})
        self.best, self.records = best, records
        return dict(run["outer"])

    def _other_state(self, given: Mapping[str, Tensor]) -> list[str]:
        """Names of state that cannot be this model's: buffers may come and go or change their shape, but for the steady ones."""
        steady = self.buffers.keys() if self.steady is None else self.steady & self.buffers.keys()
        strange = unlike({name: given[name] for name in steady if name in given}, {n: self.buffers[n] for n in steady})
        both = given.keys() & self.buffers.keys()
        return strange or [name for name in both if given[name].dtype != self.buffers[name].dtype]

    def _read(
        self, layout: Layout, files: Mapping[str, bytes]
    ) -> tuple[dict[str, Tensor], dict[str, Any], Best | None, list[RoundRecord]]:
        """The contents of the files, checked."""
        if missing := [name for name in ("parameters.safetensors", "run.safetensors") if name not in files]:
            raise CheckpointError(f"a checkpoint without {missing} cannot be resumed from.")
        weights, run = unpack_dict(files["parameters.safetensors"]), unpack_dict(files["run.safetensors"])
        complaint = misfit(_Stored, run, nan=True) or (run["best"] is not None and misfit(Best, run["best"], nan=True))
        own = dict(zip([e.name for e in layout.entries], layout.views(self.parameters), strict=True))
        if not complaint and not all(isinstance(value, Tensor) for value in weights.values()):
            complaint = "parameters that are no tensors"
        if complaint or (odd := unlike(weights, own) or self._other_state(run["buffers"])):
            raise CheckpointError(f"a checkpoint is damaged, or of another model: {complaint or odd}")
        best = Best(**run["best"]) if run["best"] is not None else None
        averaged = len(run["sections"]) * layout.numel
        if run["inner"].shape != (averaged,) or (best and best.parameters.shape != self.parameters.shape):
            raise CheckpointError(
                f"a checkpoint is damaged: optimizer state of {tuple(run['inner'].shape)} for {averaged}"
            )
        try:
            records = [RoundRecord.from_dict(r) for r in run["records"]]
        except DataError as error:
            raise CheckpointError(f"a checkpoint is damaged: {error}") from error
        return weights, run, best, records


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The form of what `RunState.to_files` stores beside the parameters."""

    generation: dict[str, Any]
    consumed: list[int]
    committed: int
    stale: int
    stopped: str
    sections: list[str]
    inner: Tensor
    buffers: dict[str, Tensor]
    best: dict[str, Any] | None
    outer: dict[Any, Any]
    aggregation: str
    downlink: dict[str, Any] | None
    records: list[dict[str, Any]]
