"""What runs on executors after a fit: the run's folders are removed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pyarrow as pa

from sparkdeep.data.scratch import release
from sparkdeep.exchange import run_folder
from sparkdeep.spark.tasks import local_dirs
from sparkdeep.store import open_store

__all__ = ["clean_task"]

# A clean-up task stays this long in its slot, so that every executor gets one.
_SPREAD_S: Final = 0.2
_RELEASE_TIMEOUT_S: Final = 5.0


def clean_task(
    run: str, shard_dir: str | None, exchange: str | None, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Remove what a run left on this executor, and its shared folders.

    Yields one row: which executor this is, by its local directories.
    """
    for _ in batches:
        pass  # a Python worker whose input is not read to its end is not used again, and the next one imports torch anew
    folders = local_dirs()
    deadline = time.monotonic() + _RELEASE_TIMEOUT_S
    for folder in [*folders, *([shard_dir] if shard_dir is not None else [])]:
        for path in Path(folder).glob(f"sparkdeep-{run}*"):
            release(path)
            while path.exists() and time.monotonic() < deadline:  # a failed stage's task may still be dying in there
                time.sleep(0.1)
                release(path)
    if exchange is not None:
        with contextlib.suppress(OSError):  # another task of this clean-up may be at it
            open_store(exchange).delete(run_folder(run))
    time.sleep(_SPREAD_S)
    yield pa.RecordBatch.from_pydict({"executor": pa.array([",".join(folders)], pa.string())})
