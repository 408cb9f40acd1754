"""What a fit tells to those who watch it: its start, each committed round, its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from sparkdeep.metrics import RoundRecord

if TYPE_CHECKING:
    from sparkdeep.spark.model import TorchModel

__all__ = ["Callback", "Callbacks", "FitInfo"]


@dataclass(frozen=True, kw_only=True)
class FitInfo:
    """What is known when the first round is about to start."""

    run: str
    """The run's id."""
    num_rounds: int | None
    """Of the whole run; None where rounds last a number of seconds."""
    committed: int
    """Rounds that an earlier call with the same `checkpoint_dir` has done already."""
    rows: int
    """Training rows of all replicas together."""
    num_parameters: int
    """Trained numbers in the model."""
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

    def on_round_end(self, record: RoundRecord) -> bool | None:
        """Called after each committed round; True ends the run."""

    def on_fit_end(self, model: TorchModel | None, error: BaseException | None) -> None:
        """Called once if `on_fit_start` was: with the trained model, or with what ended the fit."""


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

    def round(self, record: RoundRecord, free_slots: Callable[[], None]) -> str:
        """Tell of a committed round; returns "" or who asked for the end.

        Args:
            record: of the round.
            free_slots: called before a listener with `needs_spark`.
        """
        asked = ""
        for listener in self._listeners:
            if getattr(listener, "needs_spark", False):
                free_slots()
            told = listener.on_round_end if isinstance(listener, Callback) else listener
            if told(record) is True:
                asked = asked or getattr(listener, "__name__", type(listener).__name__)
        return asked

    def end(self, model: TorchModel | None, error: BaseException | None) -> None:
        """Tell every `Callback` that was told of the start, the last one first; one that raises does not silence others."""
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
