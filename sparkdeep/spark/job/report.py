"""What a job's report.html is made of: what the fit reported, and how the job ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from sparkdeep.spark.job.config import JobConfig
from sparkdeep.spark.job.result import status_of
from sparkdeep.tracking.callbacks import Callback, FitInfo
from sparkdeep.tracking.records import RoundRecord
from sparkdeep.tracking.report import About

__all__ = ["Watch", "about_run"]


@final
class Watch(Callback):
    """Keeps what a fit reports.

    Args:
        records: where each round's record is appended.
    """

    def __init__(self, records: list[Any]) -> None:
        self.info: FitInfo | None = None
        self._records = records

    def on_fit_start(self, info: FitInfo) -> None:
        """Keep the settings."""
        self.info = info

    def on_round_end(self, record: RoundRecord) -> None:
        """Keep the record."""
        self._records.append(record)


def about_run(config: JobConfig, info: FitInfo | None, error: BaseException | None, result: Mapping[str, Any]) -> About:
    """What a job's report says beside the rounds.

    Args:
        config: of the job.
        info: of its fit; None if it did not get as far as a round.
        error: what ended the job, if it failed.
        result: what the script added to the result file; its floats are scores.
    """
    return About(
        title=config.path.stem,
        status=status_of(error),
        error="" if error is None else f"{type(error).__name__}: {error}",
        num_rounds=info.num_rounds if info else None,
        rows=info.rows if info else None,
        num_parameters=info.num_parameters if info else None,
        scores={name: value for name, value in result.items() if isinstance(value, float)},
        settings=info.settings if info else {"model": config.model.name, **config.fit},
    )
