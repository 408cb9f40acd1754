"""How a job ended: its exit code, and the files that say so, its report among them, written whatever happened."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from sparkdeep.errors import ConfigError, DataError
from sparkdeep.spark.job.config import JobConfig
from sparkdeep.storage.opening import Store, open_store
from sparkdeep.tracking.callbacks import Callback, FitInfo
from sparkdeep.tracking.records import RoundRecord
from sparkdeep.tracking.report import About
from sparkdeep.versions import package_versions

__all__ = [
    "DONE",
    "FAILED",
    "WRONG_CONFIGURATION",
    "Watch",
    "about_run",
    "clear_result",
    "exit_code_of",
    "is_uri",
    "result_of",
    "status_of",
    "write_records",
    "write_report",
    "write_result",
]

Fallback = Callable[[str], Store] | None
"""Opens a URI that pyarrow refuses: Spark's Hadoop file systems."""

DONE, FAILED, WRONG_CONFIGURATION = 0, 1, 2
"""Exit codes of a job in client mode."""

_STATUS = {DONE: "done", FAILED: "failed", WRONG_CONFIGURATION: "wrong configuration"}


def exit_code_of(error: BaseException | None) -> int:
    """Returns the exit code for how a job ended; None is a job that is done."""
    if error is None:
        return DONE
    return WRONG_CONFIGURATION if isinstance(error, (ConfigError, DataError)) else FAILED


def status_of(error: BaseException | None) -> str:
    """Returns "done", "failed" or "wrong configuration"."""
    return _STATUS[exit_code_of(error)]


def is_uri(folder: str) -> bool:
    """Tells a URI from a local path; dbfs:/ has one slash."""
    return "://" in folder or folder.startswith("dbfs:/")


def result_of(error: BaseException | None, *, rounds: int, resumable: bool, seconds: float) -> dict[str, Any]:
    """Returns the result file's content, without what the job itself adds (its metrics)."""
    return {
        "status": status_of(error),
        "exit_code": exit_code_of(error),
        "error": None if error is None else {"type": type(error).__name__, "message": str(error)},
        "resumable": resumable,
        "seconds": round(seconds, 3),
        "rounds": rounds,
        "versions": package_versions(),
    }


def write_result(folder: str, name: str, content: Mapping[str, Any], *, fallback: Fallback = None) -> None:
    """Writes the result file as one JSON object, atomically where the folder is local."""
    _write(folder, name, json.dumps(_jsonable(content), indent=2, allow_nan=False) + "\n", fallback)


def write_records(folder: str, records: Sequence[Any], *, fallback: Fallback = None) -> None:
    """Writes rounds.jsonl, one record a line."""
    lines = (json.dumps(_jsonable(record.to_dict()), allow_nan=False) + "\n" for record in records)
    _write(folder, "rounds.jsonl", "".join(lines), fallback)


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


def write_report(folder: str, records: Sequence[Any], about: About, *, fallback: Fallback = None) -> None:
    """Writes report.html."""
    from sparkdeep.tracking.report import render

    _write(folder, "report.html", render(records, about), fallback)


def clear_result(folder: str, name: str) -> None:
    """Removes an earlier job's result, so that a job killed outright does not leave it behind as its own.

    A remote store's is overwritten at the end, no earlier: opening it may need the session.
    """
    if not is_uri(folder):
        (Path(folder) / name).unlink(missing_ok=True)


def _write(folder: str, name: str, text: str, fallback: Fallback) -> None:
    if is_uri(folder):
        open_store(folder, fallback=fallback).write(name, text.encode())
        return
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    temporary = home / f".{name}.{os.getpid()}"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(home / name)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    # JSON has no NaN and no infinity.
    return None if isinstance(value, float) and not math.isfinite(value) else value
