"""Errors across the boundary between executors and driver: one line of JSON inside Spark's own message, and its parser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sparkdeep import errors
from sparkdeep.errors import (
    PreflightError,
    ReplicaDiedError,
    ReplicaLostError,
    SparkdeepError,
    UserCodeError,
    VersionMismatchError,
)

__all__ = ["RemoteFailureError", "missing_module", "named_failures", "translate"]

_MARK: Final = "sparkdeep-failure:"
_LOST: Final = (
    "ExecutorLostFailure",
    "exited unexpectedly",
    "FetchFailed",
    "Could not find block",
    "BlockMissing",
    "Connection reset",
    "TaskResultLost",
    "killed intentionally",
    "cancelled",
    "No space left on device",
)

# A process that ended by itself, and not because Spark or a neighboring task made it.
_DIED: Final = ("ExecutorLostFailure", "exited unexpectedly")
# Spark's words for hosts that were lost, decommissioned or taken away.
_UNRELATED: Final = "unrelated to the running tasks"
_TASK: Final = re.compile(r"barrier task (?:Result|ShuffleMap)Task\(\d+, (\d+)\)")
_HOST: Final = re.compile(r"\(TID \d+\) \(([^\s)]+) executor")

_CANCELLED: Final = ("SPARK_JOB_CANCELLED", "OPERATION_CANCELED", "cancelled because SparkContext was shut down")


class RemoteFailureError(RuntimeError):
    """What a task raises in place of a named error, so that the driver can name it again."""


@contextmanager
def named_failures() -> Iterator[None]:
    """Inside a task: let a named error reach the driver under its own name."""
    try:
        yield
    except SparkdeepError as error:
        text = json.dumps(
            {
                "type": type(error).__name__,
                "message": str(error)[:16384],
                "traceback": getattr(error, "traceback_text", "")[-32768:],
                "replica": getattr(error, "replica", None),
                "host": getattr(error, "host", None),
            }
        )
        raise RemoteFailureError(f"{_MARK}{text}") from error


def translate(error: BaseException) -> BaseException:
    """A Spark failure as one of our errors; what we cannot name is returned as it is."""
    if isinstance(error, SparkdeepError):
        return error
    text = str(error)
    if (match := re.search(re.escape(_MARK) + r"(\{.*\})", text)) is not None:
        return _rebuilt(match[1], error)
    if any(sign in text for sign in _CANCELLED):
        return SparkdeepError(
            f"the fit's Spark job was canceled from outside (the UI, cancelJobGroup, a stopped session), and is not "
            f"repeated: {_first_line(text)}"
        )
    if "SPARK-24942" in text or "Barrier execution mode does not support dynamic resource allocation" in text:
        return PreflightError(
            "barrier stages do not run with dynamic allocation: set spark.dynamicAllocation.enabled=false and a fixed "
            "spark.executor.instances."
        )
    if "TaskResourceProfiles are only supported" in text or "ResourceProfiles are only supported" in text:
        return PreflightError(
            "cpus_per_worker, gpus_per_worker: Spark refuses a resource profile here; start the application with "
            f"spark.task.cpus or spark.task.resource.gpu.amount instead. Spark says: {_first_line(text)}"
        )
    if "SPARK-24819" in text:
        return PreflightError(
            "the cluster has fewer slots than num_workers: lower num_workers, or raise executors or cores. Spark says: "
            f"{_first_line(text)}"
        )
    if "PYTHON_VERSION_MISMATCH" in text or "have different version" in text:
        return VersionMismatchError(
            f"driver and executors run different Python versions: {_first_line(text)} Set spark.pyspark.python (and "
            "PYSPARK_PYTHON) to the same interpreter on every host."
        )
    if (missing := re.search(r"No module named '([\w.]+)'", text)) is not None:
        return missing_module(missing[1], text)
    if any(sign in text for sign in _LOST):
        died = any(sign in text for sign in _DIED) and _UNRELATED not in text
        kind = ReplicaDiedError if died else ReplicaLostError
        replica, host = _place(text)
        return kind(f"Spark lost a task: {_cause(text)}{_memory_hint(text)}", replica=replica, host=host)
    return error


def _place(text: str) -> tuple[int | None, str | None]:
    """The replica (its task's partition) and the host that Spark's message names."""
    task, host = _TASK.search(text), _HOST.search(text)
    return int(task[1]) if task else None, host[1] if host else None


def _rebuilt(text: str, cause: BaseException) -> BaseException:
    try:
        content: dict[str, Any] = json.loads(text)
        kind = getattr(errors, str(content["type"]))
    except (ValueError, KeyError, AttributeError):
        return cause
    message = str(content["message"])
    if kind is UserCodeError:
        return UserCodeError(
            message,
            replica=content["replica"],
            host=content["host"],
            traceback_text=str(content["traceback"]),
        )
    if kind is errors.NonFiniteError:
        return SparkdeepError(message)
    if isinstance(kind, type) and issubclass(kind, SparkdeepError):
        return kind(message)
    return cause


def missing_module(module: str, text: str) -> SparkdeepError:
    """An import that failed on an executor; the remedy depends on whose module it is."""
    root = module.split(".", maxsplit=1)[0]
    if root in {"sparkdeep", "torch", "pyarrow", "numpy", "safetensors", "cloudpickle", "tqdm"}:
        return VersionMismatchError(
            f"{root} is missing on an executor. Install sparkdeep and torch, in the driver's versions, in the Python that "
            "executors run (spark.pyspark.python), or ship an environment with spark.archives."
        )
    return UserCodeError(
        f"module {module!r} is missing on an executor. Your model or a callable comes from it: ship it with "
        f"spark-submit --py-files (or SparkContext.addPyFile), or install it there.\n{_cause(text)}",
        traceback_text=text,
    )


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:500]


def _cause(text: str) -> str:
    for line in text.splitlines():
        if any(sign in line for sign in _LOST):
            return line.strip()[:800]
    return _first_line(text)


def _memory_hint(text: str) -> str:
    hint = " If it ran out of memory: raise spark.executor.memoryOverhead, or lower batch_size."
    return hint if any(sign in text for sign in ("exited unexpectedly", "137", "OOM")) else ""
