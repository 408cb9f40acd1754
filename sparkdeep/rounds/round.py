"""One round and its outer step: planned, trained, committed in the driver's memory, and put on record."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from sparkdeep.errors import ConfigError, NonFiniteError
from sparkdeep.optim.gradient_rounds import searched_too_far
from sparkdeep.protocol.messages import RoundSpec, Update
from sparkdeep.protocol.orders import RoundResult, RoundWork
from sparkdeep.protocol.refusals import not_finite
from sparkdeep.rounds.guards import check_divergence, round_deadline_s
from sparkdeep.rounds.run import Run
from sparkdeep.rounds.transport import Opening
from sparkdeep.tracking.records import ReplicaRecord, RoundRecord

__all__ = ["run_round"]

_LOG = logging.getLogger("sparkdeep")


def run_round(run: Run, opening: Opening) -> RoundRecord:
    """One round and its outer step; after that it is committed in the driver's memory.

    Args:
        run: of which the next round is due.
        opening: how its replicas became ready.

    Raises:
        NonFiniteError: more rounds in a row than `max_retries` were taken back.
        ReplicaLostError: the round can be repeated.
        DivergedError: the loss grew beyond `divergence_factor`.
    """
    specs = _specs(run)
    began = time.perf_counter()
    step = _Step(run, specs)
    with contextlib.suppress(_NobodyCountsError):
        step.take()
    result = step.result
    assert result is not None
    _count_rolled_back(run, result)
    record = _record(run, specs, result, opening, seconds=time.perf_counter() - began)
    _commit(run, specs, record)
    return record


def _specs(run: Run) -> Sequence[RoundSpec]:
    """What each replica does in the next round, as it is planned or as it was recorded."""
    planned = run.state.specs()
    assert planned is not None
    specs = _replayed(planned, run.replay.get(run.state.committed + 1))
    if run.settings.gradient:
        return tuple(dataclasses.replace(spec, gradient=run.settings.gradient) for spec in specs)
    return specs


def _replayed(specs: Sequence[RoundSpec], record: RoundRecord | None) -> tuple[RoundSpec, ...]:
    """The round's specs with the decisions of its record: what a clock, a quorum or NaN decided then is prescribed now.

    Args:
        specs: by replica.
        record: of the same round in the run that is replayed; None: nothing is decided yet.

    Raises:
        ConfigError: the record is of another number of replicas.
    """
    if record is None:
        return tuple(specs)
    if len(record.replicas) != len(specs):
        raise ConfigError(
            f"round {record.round} was recorded with {len(record.replicas)} replicas, and is repeated with {len(specs)}: repeat "
            "a run with the number of workers that it had."
        )
    return tuple(
        dataclasses.replace(
            spec,
            budget_s=None,
            num_steps=part.steps + part.skipped_steps if spec.own_clock else spec.num_steps,
            skip=part.dropped,
        )
        for spec, part in zip(specs, record.replicas, strict=True)
    )


class _NobodyCountsError(Exception):
    """The round counts nobody, so that there is no outer step.

    An optimizer of torch's calls its closure when it pleases: only an exception leaves it.
    """


@final
class _Step:
    """An outer step, and the round or rounds of replicas that it asks for.

    Args:
        run: whose step it is.
        specs: of the round, by replica.
    """

    def __init__(self, run: Run, specs: Sequence[RoundSpec]) -> None:
        self._run = run
        self._specs = specs
        state, settings = run.state, run.settings
        known = max(0 if spec.budget_s is not None else spec.num_steps for spec in specs) if settings.schedule else 0
        self._work = RoundWork(
            specs=specs,
            clocks=state.clocks(),
            rows=[shard.rows["train"] for shard in state.generation.shards],
            deadline_s=round_deadline_s(state.records, settings.min_round_timeout_s, known),
        )
        self.result: RoundResult | None = None
        """What the replicas did last; with a line search, at the point that it chose."""

    def take(self) -> None:
        """Move the global parameters, buffers and averaged optimizer state.

        Raises:
            _NobodyCountsError: nothing was moved.
        """
        run, state = self._run, self._run.state
        if run.evaluations is not None:
            run.evaluations.begin()
        run.outer.step(state.parameters, self._train if run.evaluations is None else self._evaluate)
        if run.evaluations is not None:
            self.result = run.evaluations.end(state.parameters)
        state.stopped = state.stopped or run.outer.stopped
        assert self.result is not None
        if state.downlink is not None:
            state.downlink.after_step()
        # For gradients of all rows the model is in eval mode: its buffers stay as they are, and pooling would round them.
        if self._specs[0].gradient != "all":
            state.buffers = self._state(self.result)
        state.take_inner(self.result, run.layout.dtype)

    def _state(self, result: RoundResult) -> dict[str, Tensor]:
        """What the replicas' state has become; where several counted, it is fitted to the parameters, and names without a rule are told."""
        run = self._run
        if sum(update.weight > 0 for update in result.updates) < 2:
            return result.buffers
        if not run.warned and (names := run.pooling.unknown(run.state.buffers, result.buffers)):
            run.warned = True
            _LOG.warning(
                "training changes %s, of which nothing says what it becomes on several replicas: floating-point numbers take the mean, "
                "whole numbers the maximum. Say it with buffers={name: 'mean' | 'sum' | 'max' | 'min' | 'first' | function}.",
                ", ".join(map(repr, names[:5])),
            )
        return result.buffers if run.renormalize is None else run.renormalize(result.buffers)

    def _train(self) -> RoundResult:
        """Have the replicas do the round; what the outer step is given of it."""
        run, state = self._run, self._run.state
        self.result = result = run.replicas.train(self._work, state.starting(base=run.base), run.ahead(self._specs[0]))
        _check_attributes(result)
        if result.rolled_back or all(spec.skip for spec in self._specs) or self._counts_nobody(result):
            raise _NobodyCountsError
        if run.evaluations is None or not run.evaluations.records:  # a line search may try steps that are much too long
            check_divergence(result.loss, state.records, run.settings, self._work.round)
        if self._specs[0].gradient and not any(update.weight for update in result.updates):
            # No row has a weight, and so none a gradient.
            self.result = result = dataclasses.replace(result, mean=torch.zeros_like(result.mean))
        if run.outer.uses_rate:
            steps = max(update.steps for update in result.updates)
            run.outer.inner_lrs = state.rates.mean(max(self._work.clocks), steps)
        if state.downlink is not None:
            state.downlink.before_step()
        return result

    def _evaluate(self) -> RoundResult:
        run = self._run
        assert run.evaluations is not None
        try:
            return run.evaluations.at(run.state.parameters, self._train)
        except NonFiniteError as error:
            if run.evaluations.remember:
                raise searched_too_far(error) from error
            raise

    def _counts_nobody(self, result: RoundResult) -> bool:
        """Whether an outer step would be taken without data: all were idle, or out of rows, or their rows have no weight."""
        run = self._run
        return not (run.settings.gradient or run.state.downlink or any(update.weight for update in result.updates))


def _check_attributes(result: RoundResult) -> None:
    """Refuse a program that keeps state where nobody sees it: it would be lost whenever a stage closes.

    Raises:
        ConfigError: with the names, and what to do.
    """
    for replica, update in enumerate(result.updates):
        if update.changed:
            first = update.changed[0]
            raise ConfigError(
                f"training changes {', '.join(map(repr, update.changed))} (replica {replica}, round {update.round}): numbers and tensors in "
                "attributes are lost when a stage closes, and every replica has its own. Make each a buffer (register_buffer), return it "
                "from get_extra_state(), or say what becomes of it: "
                f"buffers={{{first!r}: 'max' | 'mean' | 'first' | ...}}, or 'local' where it is of no meaning between rounds."
            )


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


def _record(
    run: Run, specs: Sequence[RoundSpec], result: RoundResult, opening: Opening, *, seconds: float
) -> RoundRecord:
    """The record of a round; `seconds`: of it and its outer step."""
    compute_s = max(update.compute_s for update in result.updates)
    failures = run.ledger.take()
    return RoundRecord(
        round=specs[0].round,
        epoch=max(spec.epoch for spec in specs) + 1,
        rows=sum(update.rows for update in result.updates),
        loss=result.loss,
        logged=_logged(result.updates),
        seconds=seconds + opening.seconds,
        compute_seconds=compute_s,
        exchange_seconds=max(0.0, result.seconds - compute_s),
        outer_seconds=max(0.0, seconds - result.seconds),
        stage_seconds=opening.seconds,
        state_seconds=max(saved.seconds for saved in result.saved),
        state_bytes=sum(saved.bytes for saved in result.saved),
        retries=len(failures),
        failures=failures,
        slowest=max(range(len(specs)), key=lambda i: result.updates[i].compute_s),
        sent_bytes=result.traffic.sent_bytes,
        received_bytes=result.traffic.received_bytes,
        aggregation=run.state.aggregation,
        state_reset=list(result.reset),
        num_workers_changed=opening.changed,
        evaluations=[] if run.evaluations is None else run.evaluations.records,
        arrivals=result.arrivals,
        replicas=[
            ReplicaRecord(
                replica=i,
                host=result.hosts[i],
                rows=update.rows,
                weight=update.weight,
                steps=update.steps,
                compute_seconds=update.compute_s,
                input_seconds=update.input_s,
                dropped=spec.skip or result.dropped.get(i, ""),
                skipped_steps=_skipped(spec, result, i),
            )
            for i, (spec, update) in enumerate(zip(specs, result.updates, strict=True))
        ],
    )


def _skipped(spec: RoundSpec, result: RoundResult, replica: int) -> int:
    """Steps of its rows that a replica's clock skips."""
    if spec.skip == "idle" and spec.own_clock:
        return 0  # its clock stands still in the meantime
    if spec.skip or (replica in result.dropped and not spec.own_clock):
        return spec.num_steps
    return result.passed_over.get(replica, 0)


def _logged(updates: Sequence[Update]) -> dict[str, float]:
    """Means over the rows of those replicas that logged a name."""
    means: dict[str, float] = {}
    for name in [name for update in updates for name in update.logged]:
        parts = [(update.logged[name], update.rows) for update in updates if name in update.logged]
        means[name] = sum(value * rows for value, rows in parts) / sum(rows for _, rows in parts)
    return means


def _commit(run: Run, specs: Sequence[RoundSpec], record: RoundRecord) -> None:
    state = run.state
    epochs = state.epochs_done()
    taken = [part.steps + part.skipped_steps for part in record.replicas]
    state.consumed = state.schedule.advanced(state.consumed, specs, taken)
    state.committed = specs[0].round
    run.epoch_ended = state.epochs_done() > epochs
    state.add_record(record)
    if state.committed > run.furthest:
        run.furthest = state.committed
        run.ledger.progressed()
