"""The loop: rounds, validation, snapshots and stop rules, repeated where a replica was lost."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Generator

from sparkdeep import seams
from sparkdeep.errors import CheckpointError, FencedError, ReplicaLostError
from sparkdeep.models.validation import merge_scores
from sparkdeep.rounds.round import run_round
from sparkdeep.rounds.run import Run
from sparkdeep.rounds.run_state import Best
from sparkdeep.rounds.transport import Snapshot
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
        ReplicaDiedRepeatedlyError: the same replica died twice in a row.
        DivergedError: the loss grew beyond `divergence_factor`.
    """
    try:
        while run.pending is not None or not run.over:
            try:
                opening = run.replicas.ready(run.state, run.latest)
                if run.pending is None:
                    run.pending = run_round(run, opening)
                if run.validation_due:
                    _validate(run)
                if run.snapshot_due:
                    _keep(run)
            except ReplicaLostError as error:
                _recover(run, error)
                continue
            record = run.state.records[-1] = run.pending
            if not run.yielded:
                yield record  # whoever reads it may ask for a checkpoint of it, out of turn
            run.yielded = run.owes_checkpoint()
            if run.yielded:
                continue
            run.pending = None
            seams.reach("between", round_number=record.round)
            if not run.over:
                _rest(run, record.seconds - record.stage_seconds)
        _rest(run)
    finally:
        run.replicas.discard()


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
    run.checkpoint_asked = False
    seconds = time.perf_counter() - began
    run.pending = dataclasses.replace(
        run.pending,
        checkpoint_seconds=seconds,
        checkpoint_bytes=0 if problem else sum(len(data) for data in files.values()),
        checkpoint_error=problem,
        seconds=run.pending.seconds + seconds,
    )


def _rest(run: Run, round_s: float | None = None) -> None:
    """Close the stage if it is due; losing a replica while closing loses its kept state, and not the run."""
    try:
        run.replicas.rest(run.state, round_s)
    except ReplicaLostError as error:
        _LOG.warning("a replica was lost while the stage closed: %s", error)


def _recover(run: Run, error: ReplicaLostError) -> None:
    """Get ready to repeat what failed, or raise if it has failed too often."""
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
        snapshot = run.latest()
        assert snapshot is not None, "a durable run keeps a snapshot from its start"
        if snapshot.round < run.state.committed:
            run.outer.load_state_dict(run.state.restore(run.layout, snapshot.files, run.local, run.settings))
            run.pending, run.yielded = None, False
    run.sleep(run.settings.retry_backoff_s * 2 ** (len(run.ledger.running) - 1))
