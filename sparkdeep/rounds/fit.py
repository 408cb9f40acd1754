"""One fit: from a program and its shards to trained parameters. It knows neither Spark nor where replicas run."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from sparkdeep import seams
from sparkdeep.models.carried import Carried, pooling_of
from sparkdeep.models.packing import pack_program
from sparkdeep.models.program import NO_STEPS, Program
from sparkdeep.models.spectral import has_spectral_norms, renormalized
from sparkdeep.optim.asynchronous import OnArrival
from sparkdeep.optim.gradient_rounds import Evaluations, GradientOuter
from sparkdeep.optim.local_work import PostLocal
from sparkdeep.optim.outer import Assign, OuterOptimizer, TorchOuter
from sparkdeep.protocol.messages import ReplicaPlan, ShardFacts
from sparkdeep.rounds.downlink import Downlink
from sparkdeep.rounds.fit_checks import check_factory, check_inner_optimizer, check_model, warn_of_dense_rounds
from sparkdeep.rounds.generation import Generation
from sparkdeep.rounds.inner_rates import InnerRates
from sparkdeep.rounds.loop import run_rounds
from sparkdeep.rounds.run import Run
from sparkdeep.rounds.run_state import RunState
from sparkdeep.rounds.transport import CheckpointSnapshots, FitParts, MemorySnapshots, Snapshot, Snapshots, StageOpener
from sparkdeep.settings.contradictions import check_length, check_outer, check_together, warn_of_effects
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.tensors.encoding import codec_named
from sparkdeep.tensors.parameters import Layout
from sparkdeep.tracking.records import RoundRecord

__all__ = ["Fit", "new_run_id"]

_LOG = logging.getLogger("sparkdeep")


def new_run_id() -> str:
    """A name that no other run has."""
    return secrets.token_hex(8)


@final
@dataclass(kw_only=True)
class Fit:
    """What a fit is made of; `rounds()` runs it.

    The program's model holds the starting parameters, and the trained ones after `load_result`.
    """

    program: Program
    local: LocalSettings
    settings: RunSettings
    plan: ReplicaPlan
    shards: Sequence[ShardFacts]
    """Rows and digest of each shard, one per replica."""
    run: str
    """The run's id."""
    stages: StageOpener
    """How replicas are reached."""
    outer_optimizer: Callable[..., torch.optim.Optimizer] | None = None
    checkpoints: CheckpointDirectory | None = None
    resume: bool = True
    """Go on with the run that `checkpoints` hold; False forgets it and starts over."""
    replay: Sequence[RoundRecord] = ()
    """Records of a run whose decisions are taken again, to the same bits: quorum, time budgets, dropped replicas."""
    on_beat: Callable[[int, int], None] = lambda _replica, _rows: None
    on_log: Callable[[int, str], None] = lambda _replica, _line: None

    def __post_init__(self) -> None:
        check_together(self.local, self.settings)
        check_inner_optimizer(self.program, self.local, self.settings, self.outer_optimizer)
        warn_of_effects(self.settings)
        check_outer(self.settings, self.outer_optimizer)
        self.layout = Layout.of(self.program.model)
        self.pooling, self._carried = pooling_of(self.program), Carried(self.program)
        generation = Generation.over(self.shards, self.local, self.settings)
        self.state = RunState(
            generation=generation,
            consumed=list(generation.consumed),
            parameters=self.layout.read(self.program.model, self.layout.empty()),
            buffers=self._carried.read(),
            inner=self.layout.empty(0),
            rates=InnerRates(self.program),
            steady=self.pooling.known,
            sync_every=self.settings.sync_every,
        )
        check_length(self.settings, generation.steps)
        if isinstance(self.settings.schedule, PostLocal) and self.settings.schedule.switch_step is None:
            warn_of_dense_rounds(self.state.rates)
        down = codec_named(self.local.down_codec)
        if down.lossy or self.local.overlap:
            self.state.downlink = Downlink(down, overlap=bool(self.local.overlap), parameters=self.state.parameters)
        self.outer = self._outer()
        self.snapshots = self._snapshots()
        self.resumed_from = self._begin()
        self._warned = False

    def _outer(self) -> OuterOptimizer:
        self.evaluations: Evaluations | None = None
        check_factory(self.outer_optimizer, self.settings)
        if self.settings.work == "gradient":
            return self._gradient_outer()
        if self.outer_optimizer is None:
            return Assign()
        made_of = self.outer_optimizer, self.state.parameters, self.layout
        if self.settings.asynchronous is None:
            return TorchOuter(*made_of)
        recorded = {record.round: [replica for replica, _ in record.arrivals] for record in self.replay}
        return OnArrival(*made_of, self.settings.asynchronous, recorded=recorded, rate=self.state.rates.mean)

    def _gradient_outer(self) -> GradientOuter:
        assert self.outer_optimizer is not None
        outer = GradientOuter(
            self.outer_optimizer,
            self.state.parameters,
            self.layout,
            clip=self.local.clip_grad_norm,
            lr_scheduler=self.program.lr_scheduler,
        )
        check_model(self.program, self.settings, line_search=outer.line_search)
        self.evaluations = Evaluations(remember=outer.line_search)
        return outer

    def _snapshots(self) -> Snapshots | None:
        if self.checkpoints is not None:
            return CheckpointSnapshots(self.checkpoints)
        return MemorySnapshots() if self.settings.replica_state == "durable" else None

    def _begin(self) -> int:
        """Go on from the newest checkpoint, or keep the start as snapshot 0; returns the committed rounds."""
        seams.reach("resume")
        latest = self.snapshots.begin(resume=self.resume) if isinstance(self.snapshots, CheckpointSnapshots) else None
        if latest is not None:
            self.outer.load_state_dict(self.state.restore(self.layout, latest.files, self.local, self.settings))
        elif self.snapshots is not None and self.settings.replica_state == "durable":
            files = self.state.to_files(self.layout, self.outer.state_dict(), [])
            self.snapshots.save(Snapshot(round=0, files=files))
        return self.state.committed

    def rounds(self) -> Generator[RoundRecord]:
        """Train, yielding each round's record; see `run_rounds` for what it raises."""
        parts = FitParts(
            run=self.run,
            module=self.program.model,
            layout=self.layout,
            pooling=self.pooling,
            local=self.local,
            settings=self.settings,
            plan=self.plan,
            shards=self.shards,
            wide=self.outer_optimizer is not None,
            pushed=self.outer if isinstance(self.outer, OnArrival) else None,
            on_beat=self.on_beat,
            on_log=self.on_log,
        )
        self._run = run = Run(
            settings=self.settings,
            local=self.local,
            layout=self.layout,
            state=self.state,
            outer=self.outer,
            replicas=self.stages.replicas(parts),
            metrics=self.program.metrics or {},
            validate=any(shard.rows["validation"] for shard in self.shards),
            snapshots=self.snapshots,
            furthest=self.state.committed,
            replay={record.round: record for record in self.replay},
            evaluations=self.evaluations,
            pooling=self.pooling,
            renormalize=self._renormalized if has_spectral_norms(self.program.model) else None,
        )
        with closing(run_rounds(run)) as records:
            yield from records

    def _renormalized(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return renormalized(self.program.model, self.layout, self.state.parameters.detach(), state)

    @property
    def num_rounds(self) -> int | None:
        """Rounds of the whole run; None where rounds last a number of seconds."""
        return self.state.schedule.num_rounds

    @property
    def rounds_left(self) -> int:
        """Rounds that are not committed; where a rule decides their length, an estimate from the next one."""
        if (known := self.num_rounds) is not None:
            return known - self.state.committed
        if (specs := self.state.specs()) is None:
            return 0
        steps = self.settings.epochs * max(self.state.generation.steps) - max(self.state.consumed)
        return -(-steps // max(1, *(spec.num_steps for spec in specs)))

    @property
    def finished(self) -> bool:
        """Whether no round is left to train."""
        return bool(self.state.stopped) or self.state.specs() is None

    def close_stage(self) -> None:
        """Close the open stage: its slots are free for other Spark jobs until the next round."""
        self._run.replicas.rest(self.state)

    def stop(self, reason: str) -> None:
        """End the run after the round that was just yielded."""
        self.state.stopped = self.state.stopped or reason

    def checkpoint(self, asked_by: str) -> None:
        """Write a checkpoint of the round that was just yielded, before the next one begins.

        With `overlap`, it is of the next round. Without a checkpoint directory it warns, once.

        Args:
            asked_by: who asked for it.
        """
        if self.checkpoints is not None:
            self._run.checkpoint_asked = True
        elif not self._warned:
            self._warned = True
            _LOG.warning(
                "callback %s asked for a checkpoint, and checkpoint_dir=None: none is written. Give checkpoint_dir=, a folder "
                "or URI.",
                asked_by,
            )

    def parameters(self) -> dict[str, Tensor]:
        """Copies of the global parameters, by name, in their shapes and the layout's dtype."""
        copied = self.state.parameters.detach().clone()
        return dict(zip([entry.name for entry in self.layout.entries], self.layout.views(copied), strict=True))

    def load_result(self) -> None:
        """Put the best validated round's parameters (with early stopping) or the last ones into the program's model."""
        best = self.state.best
        parameters = best.parameters if best is not None else self.state.parameters.detach()
        buffers = best.buffers if best is not None else self.state.buffers
        self.layout.write(self.program.model, parameters)
        self._carried.write(buffers)


def plan_of(program: Program, local: LocalSettings, schema: Any, *, steps: bool = True) -> ReplicaPlan:
    """What every replica is made from, checked to be picklable.

    Args:
        program: of the fit.
        local: settings of the local work.
        schema: of the rows.
        steps: whether replicas take steps; with `work="gradient"` they need neither optimizer nor schedule, which are the
            driver's.
    """
    if not steps:
        program = replace(program, optimizer=NO_STEPS, lr_scheduler=None)
    return ReplicaPlan(program=pack_program(program), settings=local, schema=schema)
