"""The loop: rounds, validation, snapshots and stop rules, repeated where a replica was lost."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Generator, Sequence

import torch

from sparkdeep import seams
from sparkdeep.errors import CheckpointError, FencedError, NonFiniteError, ReplicaLostError
from sparkdeep.models.validation import merge_scores
from sparkdeep.optim.gradient_rounds import searched_too_far
from sparkdeep.protocol.plans import RoundSpec
from sparkdeep.protocol.refusals import not_finite
from sparkdeep.protocol.values import RoundResult, RoundWork
from sparkdeep.rounds.guards import check_divergence, round_deadline_s
from sparkdeep.rounds.recording import Told, record_of, replayed
from sparkdeep.rounds.run import Run
from sparkdeep.rounds.run_state import Best
from sparkdeep.rounds.snapshots import Snapshot
from sparkdeep.rounds.transport import Opening
from sparkdeep.tracking.records import RoundRecord

__all__ = ["run_rounds"]

_LOG = logging.getLogger("sparkdeep")


def run_rounds(run: Run) -> Generator[RoundRecord]:
    """Train round by round, yielding each one's record once it counts.

    A round is a transaction: if a replica is lost in it, the stage is opened again and the round repeated, at most
    `max_retries` times in a row. Closing the generator ends the open stage.

    Raises:
        UserCodeError, NonFiniteError, ShardMismatchError, VersionMismatchError, CheckpointError: not repeated.
        ReplicaLostError: more failures in a row than `max_retries`.
        ReplicaDiedRepeatedlyError: the same replica died twice running.
        DivergedError: the loss grew beyond `divergence_factor`.
    """
    try:
        while run.pending is not None or not _over(run):
            try:
                opening = run.replicas.ready(run.state, lambda: _latest(run))
                if run.pending is None:
                    run.pending = _round(run, opening)
                if _validation_due(run):
                    _validate(run)
                if _snapshot_due(run):
                    _keep(run)
            except ReplicaLostError as error:
                _recover(run, error)
                continue
            record, run.pending = run.pending, None
            run.state.records[-1] = record
            if not run.told:
                yield record
            run.told = _owed(run, record)
            if run.told:
                run.pending = record
                continue
            seams.reach("between", round_number=record.round)
            if not _over(run):
                _rest(run, record.seconds - record.stage_seconds)
        _rest(run)
    finally:
        run.replicas.discard()


def _over(run: Run) -> bool:
    return bool(run.state.stopped) or run.state.specs() is None


def _latest(run: Run) -> Snapshot | None:
    return run.snapshots.latest() if run.snapshots is not None else None


class _RolledBackError(Exception):
    """The round counts nobody: there is no outer step."""


def _round(run: Run, opening: Opening) -> RoundRecord:
    """One round and its outer step: afterwards it is committed in the driver's memory."""
    state = run.state
    planned = state.specs()
    assert planned is not None
    recorded = run.replay.get(state.committed + 1)
    specs = replayed(planned, recorded)
    if run.settings.gradient:
        specs = tuple(dataclasses.replace(spec, gradient=run.settings.gradient) for spec in specs)
    known = _known_steps(specs) if run.settings.schedule else 0
    work = RoundWork(
        specs=specs,
        clocks=state.clocks(),
        rows=[shard.rows["train"] for shard in state.generation.shards],
        deadline_s=round_deadline_s(state.records, run.settings.min_round_timeout_s, known),
    )
    began = time.perf_counter()
    result: RoundResult | None = None

    def closure() -> RoundResult:
        nonlocal result
        result = run.replicas.train(work, state.starting(base=run.base), _ahead(run, specs[0]))
        if result.rolled_back or all(spec.skip for spec in specs) or _counts_nobody(run, result):
            raise _RolledBackError
        if run.evaluations is None or not run.evaluations.records:  # a line search may try steps that are far too long
            check_divergence(result.loss, state.records, run.settings, specs[0].round)
        if specs[0].gradient and not any(update.weight for update in result.updates):
            result = dataclasses.replace(
                result, mean=torch.zeros_like(result.mean)
            )  # no row has a weight, and none a gradient
        if run.outer.wants_rate:
            steps = max(update.steps for update in result.updates)
            run.outer.inner_lr = state.rates.mean(max(work.clocks), steps)
        if state.downlink is not None:
            state.downlink.before_step()
        return result

    def evaluate() -> RoundResult:
        assert run.evaluations is not None
        try:
            return run.evaluations.at(state.parameters, closure)
        except NonFiniteError as error:
            if run.evaluations.remember:
                raise searched_too_far(error) from error
            raise

    if run.evaluations is not None:
        run.evaluations.begin()
    with contextlib.suppress(_RolledBackError):
        run.outer.step(state.parameters, closure if run.evaluations is None else evaluate)
        if run.evaluations is not None:
            result = run.evaluations.end(state.parameters)
        state.stopped = state.stopped or run.outer.stopped
        assert result is not None
        if state.downlink is not None:
            state.downlink.after_step()
        if specs[0].gradient != "all":  # whose model is in eval mode; pooling would round
            state.buffers = result.buffers
        state.take_inner(result, run.layout.dtype)
    assert result is not None
    _count_rolled_back(run, result)
    record = record_of(
        specs,
        result,
        seconds=time.perf_counter() - began,
        told=Told(
            opening_s=opening.seconds,
            failures=run.ledger.take(),
            aggregation=state.aggregation,
            changed=opening.changed,
            evaluations=[] if run.evaluations is None else run.evaluations.records,
        ),
    )
    epochs = state.epochs_done()
    taken = [part.steps + part.skipped_steps for part in record.replicas]
    state.consumed = state.schedule.advanced(state.consumed, specs, taken)
    state.committed = specs[0].round
    run.epoch_ended = state.epochs_done() > epochs
    state.add_record(record)
    if state.committed > run.furthest:
        run.furthest = state.committed
        run.ledger.progressed()
    return record


def _counts_nobody(run: Run, result: RoundResult) -> bool:
    """Whether an outer step would be taken on no data: all were idle, or out of rows, or their rows have no weight."""
    return not (run.settings.gradient or run.state.downlink or any(update.weight for update in result.updates))


def _known_steps(specs: Sequence[RoundSpec]) -> int:
    return max(0 if spec.budget_s is not None else spec.num_steps for spec in specs)


def _count_rolled_back(run: Run, result: RoundResult) -> None:
    run.rolled_back = run.rolled_back + 1 if result.rolled_back else 0
    if run.rolled_back > run.settings.max_retries:
        replica = next(i for i, why in sorted(result.dropped.items()) if why == "nonfinite")
        raise not_finite(
            replica,
            result.hosts[replica],
            run.state.committed + 1,
            f" {run.rolled_back} rounds in a row were taken back, and max_retries={run.settings.max_retries}.",
        )


def _ahead(run: Run, spec: RoundSpec) -> RoundSpec | None:
    """The round that replicas may begin before `spec` is committed: the next one, unless something is due in between."""
    if not run.overlap:
        return None
    state = run.state
    ends_epoch = state.schedule.epochs_done(spec.round, state.consumed) > state.epochs_done()
    if _validates_at(run, spec.round, ends_epoch) or _snapshot_at(run, spec.round):
        return None
    return state.schedule.next(spec.round)


def _validation_due(run: Run) -> bool:
    if not run.validate or run.pending is None or run.pending.metrics:
        return False
    return _validates_at(run, run.state.committed, run.epoch_ended) or _over(run)


def _validates_at(run: Run, committed: int, epoch_ended: bool) -> bool:
    if not run.validate:
        return False
    every = run.settings.validate_every
    return epoch_ended if every == "epoch" else committed % every == 0


def _validate(run: Run) -> None:
    assert run.pending is not None
    began = time.perf_counter()
    state = run.state
    scores = merge_scores(run.replicas.evaluate(state.globals()), run.metrics)
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
    return run.snapshots is not None and (run.wanted or committed % run.settings.checkpoint_every == 0)


def _owed(run: Run, record: RoundRecord) -> bool:
    """Whether the round that was just told of is to be kept, out of turn, before the next one begins."""
    if record.checkpoint_bytes:
        run.wanted = False
    # With `overlap` replicas are in the next round by now: the checkpoint is of that one.
    return run.wanted and not run.told and not run.overlap


def _keep(run: Run) -> None:
    assert run.pending is not None
    assert run.snapshots is not None
    began = time.perf_counter()
    seams.reach("checkpoint", round_number=run.state.committed)
    files = run.state.to_files(run.layout, run.outer.state_dict(), run.replicas.states(run.state.clocks()))
    problem = ""
    try:
        run.snapshots.save(Snapshot(round=run.state.committed, files=files))
    except CheckpointError as error:
        if run.settings.on_checkpoint_error == "raise" or isinstance(error, FencedError):
            raise
        _LOG.warning("%s", error)
        problem = str(error)
    run.wanted = False
    seconds = time.perf_counter() - began
    run.pending = dataclasses.replace(
        run.pending,
        checkpoint_seconds=seconds,
        checkpoint_bytes=0 if problem else sum(len(data) for data in files.values()),
        checkpoint_error=problem,
        seconds=run.pending.seconds + seconds,
    )


def _rest(run: Run, round_s: float | None = None) -> None:
    """Close the stage if it is due; a replica that is lost on the way out costs its kept state, not the run."""
    try:
        run.replicas.rest(run.state, round_s)
    except ReplicaLostError as error:
        _LOG.warning("a replica was lost while the stage closed: %s", error)


def _recover(run: Run, error: ReplicaLostError) -> None:
    """Get ready to repeat what failed, or raise when it has failed too often."""
    run.replicas.discard()
    run.ledger.add(error, run.state.committed + 1)
    _LOG.warning(
        "round %d, attempt %d of %d failed: %s",
        run.state.committed + 1,
        len(run.ledger.running),
        run.settings.max_retries + 1,
        error,
    )
    if run.settings.replica_state == "durable":
        snapshot = _latest(run)
        assert snapshot is not None, "a durable run keeps a snapshot from its start"
        if snapshot.round < run.state.committed:
            run.outer.load_state_dict(run.state.restore(run.layout, snapshot.files, run.local, run.settings))
            run.pending, run.told = None, False
    run.sleep(run.settings.retry_backoff_s * 2 ** (len(run.ledger.running) - 1))
