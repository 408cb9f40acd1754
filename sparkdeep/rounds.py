"""The loop: rounds, validation, snapshots and stop rules, repeated where a replica was lost."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

from sparkdeep.config import RunSettings
from sparkdeep.errors import CheckpointError, FencedError, ReplicaLostError
from sparkdeep.messages import Update
from sparkdeep.metrics import ReplicaRecord, RoundRecord
from sparkdeep.outer import OuterOptimizer
from sparkdeep.parameters import Layout
from sparkdeep.round_values import RoundResult
from sparkdeep.run_state import Best, RunState, Snapshot, Snapshots
from sparkdeep.schedule import RoundSpec, Schedule
from sparkdeep.transport import OpenStage, StageOpener
from sparkdeep.validation import merge_scores

__all__ = ["Run", "run_rounds"]

_LOG = logging.getLogger("sparkdeep")


@final
@dataclass(kw_only=True)
class Run:
    """What a fit is, for the loop."""

    settings: RunSettings
    schedule: Schedule
    layout: Layout
    state: RunState
    outer: OuterOptimizer
    stages: StageOpener
    metrics: Mapping[str, Any]
    validate: bool
    """Whether there are validation rows."""
    snapshots: Snapshots | None
    """Where durable states go; None: `replica_state="local"` without a checkpoint."""
    base: Literal["start", "global"] | None = None
    """What the mean of updates is added to, where they are differences."""
    overlap: bool = False
    """Whether a round may begin before the one before it is committed."""
    pending: RoundRecord | None = None
    """A committed round that is not validated or kept yet."""
    failures: int = 0
    """Attempts that failed since the run last got further."""
    furthest: int = 0
    sleep: Callable[[float], None] = field(default=time.sleep)


def run_rounds(run: Run) -> Generator[RoundRecord]:
    """Train round by round, yielding each one's record once it counts.

    A round is a transaction: if a replica is lost in it, the stage is opened again and the round repeated, at most
    `max_retries` times in a row. Closing the generator ends the open stage.

    Raises:
        UserCodeError, NonFiniteError, ShardMismatchError, VersionMismatchError, CheckpointError: not repeated.
        ReplicaLostError: more failures in a row than `max_retries`.
    """
    try:
        while run.pending is not None or not _over(run):
            try:
                stage = run.stages.current(run.state, lambda: _latest(run))
                if run.pending is None:
                    run.pending = _round(run, stage)
                if _validation_due(run):
                    _validate(run, stage)
                if _snapshot_due(run):
                    _keep(run, stage)
            except ReplicaLostError as error:
                _recover(run, error)
                continue
            record, run.pending = run.pending, None
            run.state.records[-1] = record
            yield record
            if not _over(run) and run.stages.due(record.seconds - record.stage_seconds):
                _close(run)
        _close(run)
    finally:
        run.stages.discard()


def _over(run: Run) -> bool:
    return bool(run.state.stopped) or run.schedule.next(run.state.committed) is None


def _latest(run: Run) -> Snapshot | None:
    return run.snapshots.latest() if run.snapshots is not None else None


def _round(run: Run, stage: OpenStage) -> RoundRecord:
    """One round and its outer step: afterwards it is committed in the driver's memory."""
    state = run.state
    spec = run.schedule.next(state.committed)
    assert spec is not None
    began = time.perf_counter()
    result: RoundResult | None = None

    def closure() -> RoundResult:
        nonlocal result
        result = stage.train(spec, state.starting(base=run.base), _ahead(run, spec))
        if state.downlink is not None:
            state.downlink.before_step()
        return result

    run.outer.step(state.parameters, closure)
    assert result is not None
    if state.downlink is not None:
        state.downlink.after_step()
    state.buffers = result.buffers
    # A copy: the next round's mean is written over this one's.
    state.sections, state.inner = result.sections, result.inner.to(run.layout.dtype, copy=True)
    state.committed = spec.round
    record = _record(run, stage, spec, result, time.perf_counter() - began)
    state.records.append(record)
    if state.committed > run.furthest:
        run.furthest, run.failures = state.committed, 0
    return record


def _ahead(run: Run, spec: RoundSpec) -> RoundSpec | None:
    """The round that replicas may begin before `spec` is committed: the next one, unless something is due in between."""
    if not run.overlap or run.stages.last_planned():
        return None
    if _validates_at(run, spec.round) or _snapshot_at(run, spec.round):
        return None
    return run.schedule.next(spec.round)


def _record(run: Run, stage: OpenStage, spec: RoundSpec, result: RoundResult, seconds: float) -> RoundRecord:
    compute_s = max(update.compute_s for update in result.updates)
    return RoundRecord(
        round=spec.round,
        epoch=spec.epoch + 1,
        rows=sum(update.rows for update in result.updates),
        loss=result.loss,
        logged=_logged(result.updates),
        seconds=seconds + run.stages.last_opening_s,
        compute_seconds=compute_s,
        exchange_seconds=max(0.0, result.seconds - compute_s),
        outer_seconds=max(0.0, seconds - result.seconds),
        stage_seconds=run.stages.last_opening_s,
        state_seconds=max(saved.seconds for saved in result.saved),
        state_bytes=sum(saved.bytes for saved in result.saved),
        retries=run.failures,
        sent_bytes=result.traffic.sent_bytes,
        received_bytes=result.traffic.received_bytes,
        aggregation=run.state.aggregation,
        state_reset=run.stages.committed_round(),
        replicas=[
            ReplicaRecord(
                replica=i,
                host=stage.hellos[i].host,
                rows=update.rows,
                weight=update.weight,
                steps=update.steps,
                compute_seconds=update.compute_s,
                input_seconds=update.input_s,
            )
            for i, update in enumerate(result.updates)
        ],
    )


def _logged(updates: Sequence[Update]) -> dict[str, float]:
    """Means over the rows of those replicas that logged a name."""
    means: dict[str, float] = {}
    for name in [name for update in updates for name in update.logged]:
        parts = [(update.logged[name], update.rows) for update in updates if name in update.logged]
        means[name] = sum(value * rows for value, rows in parts) / sum(rows for _, rows in parts)
    return means


def _validation_due(run: Run) -> bool:
    if not run.validate or run.pending is None or run.pending.metrics:
        return False
    return _validates_at(run, run.state.committed)


def _validates_at(run: Run, committed: int) -> bool:
    if not run.validate:
        return False
    every = run.settings.validate_every
    if committed == run.schedule.num_rounds:
        return True
    return committed % (run.schedule.rounds_per_epoch if every == "epoch" else every) == 0


def _validate(run: Run, stage: OpenStage) -> None:
    assert run.pending is not None
    began = time.perf_counter()
    state = run.state
    scores = merge_scores(stage.evaluate(state.globals()), run.metrics)
    seconds = time.perf_counter() - began
    run.pending = dataclasses.replace(
        run.pending, metrics=scores, validation_seconds=seconds, seconds=run.pending.seconds + seconds
    )
    state.records[-1] = run.pending
    rule = run.settings.early_stopping
    if rule is None:
        return
    score = scores[rule.monitor]
    if rule.improves(score, state.best.score if state.best else None):
        state.stale = 0
        state.best = Best(
            round=state.committed, score=score, parameters=state.parameters.detach().clone(), buffers=state.buffers
        )
        return
    state.stale += 1
    if state.stale >= rule.patience:
        state.stopped = (
            f"no better {rule.monitor} in {state.stale} validations; "
            f"the best was round {state.best.round if state.best else 0}"
        )


def _snapshot_due(run: Run) -> bool:
    if run.snapshots is None or run.pending is None or run.pending.checkpoint_bytes:
        return False
    return _snapshot_at(run, run.state.committed) or _over(run)


def _snapshot_at(run: Run, committed: int) -> bool:
    return run.snapshots is not None and committed % run.settings.checkpoint_every == 0


def _keep(run: Run, stage: OpenStage) -> None:
    assert run.pending is not None
    assert run.snapshots is not None
    began = time.perf_counter()
    files = run.state.to_files(run.layout, run.outer.state_dict(), stage.states())
    problem = ""
    try:
        run.snapshots.save(Snapshot(round=run.state.committed, files=files))
    except CheckpointError as error:
        if run.settings.on_checkpoint_error == "raise" or isinstance(error, FencedError):
            raise
        _LOG.warning("%s", error)
        problem = str(error)
    seconds = time.perf_counter() - began
    run.pending = dataclasses.replace(
        run.pending,
        checkpoint_seconds=seconds,
        checkpoint_bytes=0 if problem else sum(len(data) for data in files.values()),
        checkpoint_error=problem,
        seconds=run.pending.seconds + seconds,
    )


def _close(run: Run) -> None:
    """Close the stage in good order; a replica that is lost on the way out costs its kept state, not the run."""
    try:
        run.stages.close(run.state.committed)
    except ReplicaLostError as error:
        _LOG.warning("a replica was lost while the stage closed: %s", error)


def _recover(run: Run, error: ReplicaLostError) -> None:
    """Get ready to repeat what failed, or raise when it has failed too often."""
    run.stages.discard()
    run.failures += 1
    if run.failures > run.settings.max_retries:
        raise error
    _LOG.warning(
        "round %d, attempt %d of %d failed: %s",
        run.state.committed + 1,
        run.failures,
        run.settings.max_retries + 1,
        error,
    )
    if run.settings.replica_state == "durable":
        snapshot = _latest(run)
        assert snapshot is not None, "a durable run keeps a snapshot from its start"
        if snapshot.round < run.state.committed:
            run.outer.load_state_dict(run.state.restore(run.layout, snapshot.files))
            run.pending = None
    run.sleep(run.settings.retry_backoff_s * 2 ** (run.failures - 1))
