"""A Spark action in a thread of its own, with a tag to cancel it by and a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from sparkdeep.errors import ReplicaLostError
from sparkdeep.spark.session.access import access_to
from sparkdeep.spark.session.failures import translate

__all__ = ["SparkJob", "mapped"]

_LOOK_EVERY_S = 1.0


class SparkJob:
    """A Spark action in a thread, cancelable by its tag; the caller's job group and properties are left as they are."""

    def __init__(
        self,
        spark: SparkSession,
        frame: DataFrame,
        *,
        tag: str,
        description: str,
        action: Callable[[DataFrame], Sequence[Any]] | None = None,
    ) -> None:
        self._access = access_to(spark)
        self._frame = frame
        self._action = action or methodcaller("collect")
        self._tag = tag
        self._failure: BaseException | None = None
        self._rows: Sequence[Any] | None = None
        self._thread = self._access.start(self._run, tag=tag, description=description)

    def _run(self) -> None:
        try:
            self._rows = self._action(self._frame)
        except BaseException as error:  # noqa: BLE001 (handed to the thread that asks for `failure` or `result`)
            self._failure = translate(error)

    def failure(self) -> BaseException | None:
        """Why the job failed, named if we can name it; None while it runs or when it ended well."""
        return self._failure

    def result(
        self,
        timeout_s: float,
        what: str,
        *,
        idle_timeout_s: float | None = None,
        on_busy: Callable[[], None] = lambda: None,
    ) -> Sequence[Any]:
        """Wait for the rows.

        Args:
            timeout_s: for the whole job.
            what: what it is, for messages.
            idle_timeout_s: how long it may have no running task, because other jobs hold the slots that it waits for.
            on_busy: called every second in which it has one, where `idle_timeout_s` is given.

        Raises:
            ReplicaLostError: the job did not end, or had no slots, in time; it is canceled, as on Ctrl-C.
            Exception: why it failed.
        """
        try:
            self._wait(timeout_s, what, idle_timeout_s, on_busy)
        except BaseException:
            self.cancel()
            raise
        if self._failure is not None:
            raise self._failure
        if self._rows is None:
            raise ReplicaLostError(f"{what} was not submitted: its thread ended before; see its traceback above.")
        return self._rows

    def _wait(self, timeout_s: float, what: str, idle_timeout_s: float | None, on_busy: Callable[[], None]) -> None:
        began = busy = looked = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(timeout=0.1)
            now = time.monotonic()
            if now - began > timeout_s:
                raise ReplicaLostError(f"{what} did not end within {timeout_s:g} s and was canceled.")
            if idle_timeout_s is None or now - looked < _LOOK_EVERY_S:
                continue
            looked = now
            if self._access.has_tasks(self._tag) is not False:
                busy = now
                on_busy()
            elif now - busy > idle_timeout_s:
                raise ReplicaLostError(
                    f"{what} had no running task for {idle_timeout_s:g} s and was canceled: a barrier stage needs all its "
                    "slots at the same time, and other jobs hold them. Let those end, give this session more executors, "
                    "lower num_workers, or raise open_timeout_s."
                )

    def finish(self, timeout_s: float) -> None:
        """Wait for the end; the tasks have reported everything by now."""
        self._thread.join(timeout=timeout_s)
        if self._thread.is_alive():
            self.cancel()
            raise ReplicaLostError(
                f"the stage did not end within {timeout_s:g} s after its replicas were told to stop."
            )

    def cancel(self) -> None:
        """Cancel the job by its tag, and give it a moment to go."""
        if self._thread.is_alive():
            self._access.cancel(self._tag)
            self._thread.join(timeout=5.0)


def mapped(frame: DataFrame, task: Callable[..., Any], columns: str, *, barrier: bool, profile: Any) -> DataFrame:
    """`frame.mapInArrow`, in a stage of that resource profile unless it is None."""
    extra = {"profile": profile} if profile is not None else {}
    return frame.mapInArrow(task, columns, barrier=barrier, **extra)
