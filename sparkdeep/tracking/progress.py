"""The progress bar of a fit: rounds, loss, rows a second, time left; in terminals, notebooks and logs."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Final, TextIO, final

from tqdm.auto import tqdm

from sparkdeep.tracking.records import RoundRecord

__all__ = ["Progress"]

_LINE_EVERY_S: Final = 10.0


@final
class Progress:
    """A tqdm bar over rounds; what replicas print goes above it.

    In a terminal and in a notebook the bar moves in place. Into a pipe or a file it is written as whole lines, one at
    the start, one every ten seconds or longer, and one at the end.

    Args:
        enabled: False shows no bar; printed lines still appear.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: Any = None
        self._moves = True

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, rounds: int | None, committed: int) -> None:
        """Show the bar, with `committed` of `rounds` already done; None: the number of rounds is not known."""
        self._moves = _is_notebook() or sys.stderr.isatty()
        if self._moves:
            looks: dict[str, Any] = {"dynamic_ncols": True}
        else:
            looks = {"file": _Lines(sys.stderr), "mininterval": _LINE_EVERY_S, "miniters": 1}
        self._bar = tqdm(
            total=rounds, initial=committed, disable=not self._enabled, unit="round", desc="sparkdeep", **looks
        )

    def advance(self, record: RoundRecord) -> None:
        """Show a committed round; after a roll-back the bar goes back too."""
        shown = {"loss": f"{record.loss:.4f}", "rows/s": f"{record.rows_per_second:,.0f}"}
        shown.update({f"val {name}": f"{value:.4f}" for name, value in record.metrics.items()})
        self._bar.set_postfix(shown, refresh=False)
        step = record.round - self._bar.n
        self._bar.update(step)
        if step < 0:  # tqdm would show it only with the next round
            self._bar.refresh()

    def finish(self, text: str) -> None:
        """Close the bar and print how the run went, if anything is shown at all."""
        self._bar.close()
        if self._enabled:
            tqdm.write(text)

    def beat(self, replica: int, rows: int) -> None:
        """A replica is `rows` rows into a round: keep the clock running."""
        del replica, rows
        if self._bar is not None and self._moves:
            self._bar.refresh()

    def log(self, replica: int, line: str) -> None:
        """Print a replica's output."""
        tqdm.write(f"[replica {replica}] {line}")


@final
class _Lines:
    """Where there is no cursor to move back, each state of the bar becomes a line of its own."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._last = ""
        self.encoding = getattr(file, "encoding", None)  # tqdm draws the bar with what it can hold

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line and line != self._last:
            self._last = line
            self._file.write(f"{line}\n")

    def flush(self) -> None:
        self._file.flush()


def _is_notebook() -> bool:
    """Whether tqdm.auto chose the notebook's widget."""
    return any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
