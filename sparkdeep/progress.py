"""The progress bar of a fit: rounds, loss, rows a second, time left; in terminals and notebooks alike."""

from __future__ import annotations

from types import TracebackType
from typing import Any, final

from tqdm.auto import tqdm

from sparkdeep.metrics import RoundRecord

__all__ = ["Progress"]


@final
class Progress:
    """A tqdm bar over rounds; what replicas print goes above it.

    Args:
        enabled: False shows no bar; printed lines still appear.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, rounds: int, committed: int) -> None:
        """Show the bar, `committed` of `rounds` already done."""
        self._bar = tqdm(
            total=rounds,
            initial=committed,
            disable=not self._enabled,
            unit="round",
            desc="sparkdeep",
            dynamic_ncols=True,
        )

    def advance(self, record: RoundRecord) -> None:
        """Show a committed round; after a roll-back the bar goes back too."""
        shown = {"loss": f"{record.loss:.4f}", "rows/s": f"{record.rows_per_second:,.0f}"}
        shown.update({f"val {name}": f"{value:.4f}" for name, value in record.metrics.items()})
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(record.round - self._bar.n)

    def finish(self, text: str) -> None:
        """Close the bar and print how the run went, if anything is shown at all."""
        self._bar.close()
        if self._enabled:
            tqdm.write(text)

    def beat(self, replica: int, rows: int) -> None:
        """A replica is `rows` rows into a round: keep the clock running."""
        del replica, rows
        if self._bar is not None:
            self._bar.refresh()

    def log(self, replica: int, line: str) -> None:
        """Print what a replica printed."""
        tqdm.write(f"[replica {replica}] {line}")
