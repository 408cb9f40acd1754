"""Spark's Python daemon with torch imported, so that the workers that it forks need not import it.

It is used where a session is started with this property:

    spark.python.daemon.module  sparkdeep.spark.daemon

A static property of the session, read by every executor when it starts its daemon; sparkdeep must be installed there.
A fork takes along one thread only, so what is imported must not have started others: two libraries are told not to for
as long as they are imported, and if there is another thread all the same the daemon refuses to start. Nothing here
runs a tensor operation or touches CUDA, which cannot be used after a fork.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

__all__ = ["main", "refusal"]

# The tasks of training and of `transform`, and with them torch, numpy and pyarrow.
_IMPORTS: Final = (
    "sparkdeep.spark.tasks.replica_tasks",
    "sparkdeep.spark.tasks.round_tasks",
    "sparkdeep.spark.model.scoring",
)
_QUIET: Final = {
    # numpy's OpenBLAS starts its threads when it is loaded; in the workers numpy's own products stay on one thread.
    "OPENBLAS_NUM_THREADS": "1",
    # jemalloc comes with pyarrow and sweeps in a thread; workers use another allocator unless told otherwise.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


def refusal(threads: Sequence[str], *, cuda: bool) -> str:
    """Why this process must not fork workers; "" if it may.

    Args:
        threads: names of its threads, its own included.
        cuda: whether CUDA was initialized in it.
    """
    remedy = "Unset spark.python.daemon.module to use Spark's own daemon"
    if len(threads) > 1:
        return (
            f"sparkdeep.spark.daemon: {len(threads)} threads after its imports ({', '.join(threads)}), but a process that "
            "forks workers must have one: a lock that another thread holds would stay locked in them. "
            f"{remedy}, or remove what starts threads at import (a sitecustomize, a tracing agent)."
        )
    if cuda:
        return (
            f"sparkdeep.spark.daemon: its imports initialized CUDA, which cannot be used after a fork. {remedy}, or remove "
            "what touches CUDA at import."
        )
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _QUIET}
    os.environ.update(_QUIET)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _threads() -> list[str]:
    """This process's threads; where the system tells, those that Python knows nothing of included."""
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        return [thread.name for thread in threading.enumerate()]
    return [(task / "comm").read_text().strip() for task in tasks.iterdir()]


def main() -> None:
    """Import, and be the daemon.

    Raises:
        SystemExit: this process must not fork workers; the reason is on stderr, which Spark shows.
    """
    with _quiet():
        for name in _IMPORTS:
            importlib.import_module(name)
    if problem := refusal(_threads(), cuda=sys.modules["torch"].cuda.is_initialized()):
        raise SystemExit(problem)
    from pyspark import daemon

    daemon.manager()


if __name__ == "__main__":
    main()
