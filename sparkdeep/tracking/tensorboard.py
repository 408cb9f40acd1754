"""TensorBoard event files of a run."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, final

from sparkdeep.errors import ConfigError
from sparkdeep.tracking.callbacks import Callback, FitInfo
from sparkdeep.tracking.records import RoundRecord, numbers_of

if TYPE_CHECKING:
    from sparkdeep.spark.model.model import TorchModel

__all__ = ["TensorBoardCallback"]


@final
class TensorBoardCallback(Callback):
    """Writes event files for `tensorboard --logdir`; needs the extra `tensorboard`.

    Scalars, with the round as their step: `loss`, `validation/NAME`, `rows_per_second`, `seconds/NAME`, and each
    replica's `replica_rows_per_second/N`. The settings are logged as text. A fit that goes on from a checkpoint hides
    what an earlier one wrote for the rounds that it runs again.

    Args:
        log_dir: folder of this run's files; a local path, as the driver sees it.

    Raises:
        ConfigError: TensorBoard is not installed. It is raised when the callback is made, so that no fit runs in vain.
    """

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"TensorBoardCallback needs tensorboard, which cannot be imported ({error}): pip install "
                "'sparkdeep[tensorboard]'."
            ) from error
        self._make: Any = SummaryWriter
        self._log_dir = os.fspath(log_dir)
        self._writer: Any = None

    def on_fit_start(self, info: FitInfo) -> None:
        """Open the files and write the settings."""
        purge = info.committed + 1 if info.committed else None
        self._writer = self._make(log_dir=self._log_dir, purge_step=purge)
        lines = (f"| {_cell(name)} | {_cell(value)} |" for name, value in info.settings.items())
        self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *lines]), info.committed)

    def on_round_end(self, record: RoundRecord) -> None:
        """Write a round, and flush so that it can be seen at once."""
        for name, value in numbers_of(record).items():
            self._writer.add_scalar(name, value, record.round)
        for part in record.replicas:
            if part.compute_seconds > 0:
                speed = part.rows / part.compute_seconds
                self._writer.add_scalar(f"replica_rows_per_second/{part.replica}", speed, record.round)
        self._writer.flush()

    def on_fit_end(self, model: TorchModel | None, error: BaseException | None) -> None:
        """Close the files."""
        del model
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        if error is not None:
            writer.add_text("error", f"    {type(error).__name__}: {error}".replace("\n", "\n    "))
        writer.close()


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.replace("|", "\\|").replace("\n", " ")
