"""Callbacks, called at a fit's start, after each committed round and at its end; the clock of that start is one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final

from sparkdeep.tracking.records import RoundRecord

if TYPE_CHECKING:
    from torch import Tensor

    from sparkdeep.spark.model.model import TorchModel

__all__ = ["Callback", "Callbacks", "FitInfo", "Phases", "StartUp"]

_LOG = logging.getLogger("sparkdeep")


@dataclass(frozen=True, kw_only=True)
class FitInfo:
    """What is known when the first round is about to start."""

    run: str
    """The run's id."""
    num_rounds: int | None
    """Rounds of the whole run; None where rounds last a number of seconds."""
    committed: int
    """Rounds that an earlier call with the same `checkpoint_dir` has done already."""
    rows: int
    """Training rows of all replicas together."""
    num_parameters: int
    """Number of trainable parameters."""
    settings: Mapping[str, Any]
    """The estimator's settings by name: plain values, and names of callables."""


class Callback:
    """A listener to a fit; override what you need. A plain function of the record serves as `on_round_end`.

    An exception that a method raises ends the fit. With the attribute `needs_spark = True`, `on_round_end` is called
    while no stage holds the session's slots, so that it may run Spark jobs.
    """

    needs_spark: bool = False

    def on_fit_start(self, info: FitInfo) -> None:
        """Called once, after ingest and before the first round."""

    def on_round_parameters(self, record: RoundRecord, parameters: Mapping[str, Tensor]) -> None:
        """Called before `on_round_end` with copies of the global parameters, by name in `named_parameters()`, on the CPU.

        Only where it is overridden: otherwise nothing is copied. Parameters of less than 32 bits are given as float32,
        as they are averaged; frozen ones are left out.
        """

    def on_round_end(self, record: RoundRecord) -> bool | Literal["checkpoint"] | None:
        """Called after each committed round. True ends the run, "checkpoint" writes one now, to `checkpoint_dir`."""

    def on_fit_end(self, model: TorchModel | None, error: BaseException | None) -> None:
        """Called once if `on_fit_start` was called: with the trained model, or with the exception that ended the fit."""


@final
class Callbacks:
    """All listeners of one fit, in the order in which they were given."""

    def __init__(self, listeners: Iterable[Callback | Callable[[RoundRecord], Any]]) -> None:
        self._listeners = list(listeners)
        self._started: list[Callback] = []

    def start(self, info: FitInfo) -> None:
        """Tell every `Callback` that the rounds begin."""
        for listener in self._listeners:
            if isinstance(listener, Callback):
                self._started.append(listener)
                listener.on_fit_start(info)

    def round(
        self,
        record: RoundRecord,
        free_slots: Callable[[], None],
        *,
        parameters: Callable[[], Mapping[str, Tensor]] = dict,
        checkpoint: Callable[[str], None] = lambda _who: None,
    ) -> str:
        """Report a committed round; returns "" or the name of the callback that asked for the end.

        Args:
            record: of the round.
            free_slots: called before a listener with `needs_spark`.
            parameters: gives copies of the global ones; called once if a listener asks for them.
            checkpoint: called with the name of a listener that asks for a checkpoint.
        """
        asked = ""
        copies: Mapping[str, Tensor] | None = None
        for listener in self._listeners:
            if getattr(listener, "needs_spark", False):
                free_slots()
            if isinstance(listener, Callback) and _wants_parameters(listener):
                copies = parameters() if copies is None else copies
                listener.on_round_parameters(record, copies)
            answer = listener.on_round_end(record) if isinstance(listener, Callback) else listener(record)
            name = getattr(listener, "__name__", type(listener).__name__)
            if answer is True:
                asked = asked or name
            elif isinstance(answer, str) and answer == "checkpoint":
                checkpoint(name)
        return asked

    def end(self, model: TorchModel | None, error: BaseException | None) -> None:
        """Call every `Callback` whose `on_fit_start` was called, in reverse order, even if one raises."""
        failures: list[BaseException] = []
        while self._started:
            try:
                self._started.pop().on_fit_end(model, error)
            except Exception as raised:  # noqa: BLE001 (raised below, after the others have heard)
                failures.append(raised)
        if failures and error is None:
            raise failures[0]
        for failure in failures:
            assert error is not None
            error.add_note(f"a callback's on_fit_end then raised {type(failure).__name__}: {failure}")


def _wants_parameters(listener: Callback) -> bool:
    return type(listener).on_round_parameters is not Callback.on_round_parameters


@dataclass(frozen=True, kw_only=True)
class StartUp:
    """Seconds from the call of `fit` to the first local step."""

    checks_s: float
    """Settings, session, free slots, schema, and building the model on the driver."""
    ingest_s: float
    """Rows to shards, Python workers that start for it included."""
    rehearsal_s: float
    """The first rows through the model on the driver, and packing it."""
    opening_s: float
    """Reading checkpoints, calling callbacks, opening the first stage: tasks launched, replicas built, parameters sent."""

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.checks_s + self.ingest_s + self.rehearsal_s + self.opening_s

    def __str__(self) -> str:
        """One line for a log."""
        return (
            f"{self.total_s:.2f} s before the first step: checks {self.checks_s:.2f}, ingest {self.ingest_s:.2f}, rehearsal "
            f"{self.rehearsal_s:.2f}, opening the first stage {self.opening_s:.2f}"
        )


@final
class Phases:
    """The clock of one fit's start; it listens to the rounds for the first of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        self._seconds: dict[str, float] = {}
        self.startup: StartUp | None = None
        """None until the first round is done, and for a fit that has no rounds left."""

    def end(self, phase: str) -> None:
        """End the phase that began when the last one ended: "checks", "ingest" or "rehearsal"."""
        now = self._clock()
        self._seconds[f"{phase}_s"] = now - self._last
        self._last = now

    def __call__(self, record: RoundRecord) -> Any:
        """Note a round: how long the first one took tells when it began."""
        if self.startup is None:
            opening_s = max(0.0, self._clock() - self._last - (record.seconds - record.stage_seconds))
            self.startup = StartUp(opening_s=opening_s, **self._seconds)
            _LOG.info("%s", self.startup)
