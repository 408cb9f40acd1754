"""The evaluations of one gradient round: each asked for once, and what is known at the parameters that it ends with kept."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from sparkdeep.messages import Update
from sparkdeep.metrics import EvaluationRecord
from sparkdeep.parameters import raw_bytes
from sparkdeep.round_values import RoundResult, Traffic

__all__ = ["Evaluations", "place_of"]


def place_of(parameters: Tensor) -> bytes:
    """16 bytes that name these parameters to the last bit."""
    return hashlib.blake2b(raw_bytes(parameters), digest_size=16).digest()


@final
class Evaluations:
    """What was evaluated in a round, by the bytes of the parameters.

    L-BFGS with one iteration a step asks again, as each begins, for the loss and gradient with which the one before ended: its
    line search has been at that very point, so that asking costs nothing. An attempt that failed leaves what it found out to
    the next one. What is kept between rounds is not part of a checkpoint: after a restart it is evaluated once more, to the
    same bits.

    Memory: a gradient for each evaluation of the round, some 26 at most; of a round that is over, one.

    Args:
        remember: whether results are functions of the parameters alone: with all rows, in eval mode.
    """

    def __init__(self, *, remember: bool) -> None:
        self.remember = remember
        self._known: dict[bytes, RoundResult] = {}
        self._fresh: list[RoundResult] = []
        self._first: RoundResult | None = None
        self.records: list[EvaluationRecord] = []
        """One a call of the closure in this attempt."""

    def begin(self) -> None:
        """Begin an attempt at a round."""
        self._fresh, self._first, self.records = [], None, []

    def at(self, parameters: Tensor, evaluate: Callable[[], RoundResult]) -> RoundResult:
        """What is known at `parameters`, (numel,), or else what `evaluate` gives."""
        began = time.perf_counter()
        place = place_of(parameters) if self.remember else b""
        result = self._known.get(place)
        cached = result is not None
        if result is None:
            result = evaluate()
            if self.remember:
                # A copy: the next evaluation's mean is written over this one's.
                result = self._known[place] = dataclasses.replace(result, mean=result.mean.clone())
            self._fresh.append(result)
        self._first = self._first or result
        self.records.append(
            EvaluationRecord(
                loss=result.loss,
                gradient_norm=float(torch.linalg.vector_norm(result.mean.to(torch.float64))),
                seconds=time.perf_counter() - began,
                cached=cached,
            )
        )
        return result

    def end(self, parameters: Tensor) -> RoundResult:
        """The round as a whole, which ended at `parameters`, (numel,); what is known elsewhere is forgotten.

        Its loss is that at its end where the line search has been there, as it has, and else that with which it began.
        """
        assert self._first is not None, "the optimizer's step did not call its closure"
        if not self.remember:
            return self._first
        place = place_of(parameters)
        self._known = {place: self._known[place]} if place in self._known else {}
        at_end = self._known.get(place, self._first)
        fresh = self._fresh
        return dataclasses.replace(
            at_end,
            updates=[_added(update, [one.updates[i] for one in fresh]) for i, update in enumerate(at_end.updates)],
            seconds=sum(one.seconds for one in fresh),
            traffic=Traffic(
                sent_bytes=sum(one.traffic.sent_bytes for one in fresh),
                received_bytes=sum(one.traffic.received_bytes for one in fresh),
            ),
        )


def _added(update: Update, parts: Sequence[Update]) -> Update:
    """A replica's header for the whole round: rows and times of all its evaluations."""
    return dataclasses.replace(
        update,
        rows=sum(part.rows for part in parts),
        compute_s=sum(part.compute_s for part in parts),
        input_s=sum(part.input_s for part in parts),
        logged=update.logged if parts else {},
    )
