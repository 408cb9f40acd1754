from __future__ import annotations

import pytest

pytest.importorskip("pyspark")

from sparkdeep.errors import (
    ConfigError,
    DataError,
    PreflightError,
    ReplicaDiedError,
    ReplicaLostError,
    SparkdeepError,
    UserCodeError,
    VersionMismatchError,
)
from sparkdeep.spark.session.failures import RemoteFailureError, named_failures, translate


def through_spark(error):
    """What the driver sees of an error that a task raised: its text, inside Spark's own."""
    with pytest.raises(RemoteFailureError) as caught, named_failures():
        raise error
    return RuntimeError(
        "Job aborted due to stage failure: Could not recover from a failed barrier ResultStage.\n"
        f'  File "worker.py", line 1, in main\nsparkdeep.x.RemoteFailureError: {caught.value}\n\tat java.base/x.java:1)\n'
    )


@pytest.mark.parametrize("kind", [DataError, ConfigError, PreflightError, VersionMismatchError, ReplicaLostError])
def test_a_named_error_of_a_task_is_the_same_on_the_driver(kind):
    named = translate(through_spark(kind('column "x" {of} two\nlines')))
    assert type(named) is kind
    assert str(named) == 'column "x" {of} two\nlines'


def test_a_users_error_keeps_replica_host_and_traceback():
    named = translate(through_spark(UserCodeError("it raised", replica=1, host="here", traceback_text="Traceback\n x")))
    assert isinstance(named, UserCodeError)
    assert (named.replica, named.host, named.traceback_text) == (1, "here", "Traceback\n x")


def test_an_error_without_a_name_is_left_as_it_is_inside_a_task_and_on_the_driver():
    own = KeyError("x")
    with pytest.raises(KeyError) as caught, named_failures():
        raise own
    assert caught.value is own
    assert translate(own) is own
    named = DataError("x")
    assert translate(named) is named


@pytest.mark.parametrize(
    ("text", "kind", "part"),
    [
        (
            "[SPARK-24942]: Barrier execution mode does not support ...",
            PreflightError,
            "dynamicAllocation.enabled=false",
        ),
        ("[SPARK-24819]: Barrier execution mode does not allow ...", PreflightError, "lower num_workers"),
        ("[PYTHON_VERSION_MISMATCH] Python in worker has ...", VersionMismatchError, "PYSPARK_PYTHON"),
        ("ModuleNotFoundError: No module named 'torch.nn'", VersionMismatchError, "torch is missing on an executor"),
        ("ModuleNotFoundError: No module named 'shop.nets'", UserCodeError, "--py-files"),
        ("ExecutorLostFailure (executor 1 exited with code 137)", ReplicaDiedError, "memoryOverhead"),
        (
            "ExecutorLostFailure (executor 1 exited unrelated to the running tasks)",
            ReplicaLostError,
            "Spark lost a task",
        ),
        ("Could not find block rdd_3_1", ReplicaLostError, "Spark lost a task"),
        ("[SPARK_JOB_CANCELLED] Job 3 cancelled as part of ...", SparkdeepError, "not repeated"),
    ],
)
def test_what_spark_says_is_named_with_the_remedy(text, kind, part):
    named = translate(RuntimeError(f"An error occurred.\n{text}\n\tat scala.x"))
    assert type(named) is kind
    assert part in str(named)


@pytest.mark.parametrize("content", ["{broken", '{"type": "os"}', '{"type": "Exception", "message": "m"}'])
def test_a_line_that_only_looks_like_ours_is_left_as_it_is(content):
    error = RuntimeError(f"sparkdeep-failure:{content}")
    assert translate(error) is error


def test_the_task_and_the_host_are_read_from_sparks_words():
    text = (
        "Stage failed because barrier task ResultTask(4, 1) finished unsuccessfully. Lost task 1.0 in stage 4.0 (TID 7) "
        "(10.0.0.3 executor 2): Python worker exited unexpectedly (crashed)"
    )
    error = translate(RuntimeError(text))
    assert (type(error), error.replica, error.host) == (ReplicaDiedError, 1, "10.0.0.3")
