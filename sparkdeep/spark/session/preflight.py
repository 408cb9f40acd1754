"""What can be known before anything runs: versions, barrier rules, slots, GPUs."""

from __future__ import annotations

import platform
import time
from typing import Any

import pyspark
from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

from sparkdeep.errors import PreflightError
from sparkdeep.spark.session.access import access_to

__all__ = ["check_session", "check_slots", "is_local", "task_profile"]


_KILLS_IDLE_WORKERS = ("spark.sql.execution.pyspark.udf.killOnIdleTimeout", "spark.python.worker.killOnIdleTimeout")
"""Of the two the session's counts, where it is set (Spark 4.1)."""


def check_session(spark: SparkSession) -> None:
    """Refuse a session in which barrier stages cannot run, or whose versions were never tried.

    Raises:
        PreflightError: with the setting to change.
    """
    major, minor = (int(part) for part in pyspark.__version__.split(".")[:2])
    if not (3, 5) <= (major, minor) < (5, 0):
        raise PreflightError(
            f"pyspark {pyspark.__version__}: sparkdeep runs on Spark 3.5 to 4.x; install pyspark>=3.5,<5."
        )
    if tuple(map(int, platform.python_version_tuple()[:2])) < (3, 11):
        raise PreflightError(f"Python {platform.python_version()}: sparkdeep needs Python 3.11 or newer.")
    access = access_to(spark)
    if access.connect and major < 4:
        raise PreflightError(
            f"Spark Connect with pyspark {pyspark.__version__}: sparkdeep needs Spark 4.0 or newer there; use a classic session."
        )
    if str(access.conf("spark.dynamicAllocation.enabled", "false")).lower() == "true":
        raise PreflightError(
            "spark.dynamicAllocation.enabled=true: Spark runs no barrier stage with dynamic allocation. Start the application "
            "with spark.dynamicAllocation.enabled=false and a fixed spark.executor.instances."
        )
    for key in _KILLS_IDLE_WORKERS:
        value = access.conf(key)
        if str(value).strip().lower() == "true":
            raise PreflightError(f"{key}=true: Spark would kill a replica that trains silently. Set it to false.")
        if value is not None:
            break


def is_local(spark: SparkSession) -> bool:
    """Whether driver and executor are one process; False where the session does not tell."""
    master = access_to(spark).master or ""
    return master == "local" or master.startswith("local[")


def task_profile(spark: SparkSession, cpus_per_worker: int | None, gpus_per_worker: int | None) -> Any:
    """The stage's TaskResourceProfile, or None when Spark's own task settings apply.

    Raises:
        PreflightError: stage-level scheduling is not possible here; the message names the property to set instead.
    """
    if cpus_per_worker is None and gpus_per_worker is None:
        return None
    access = access_to(spark)
    amount = float(access.conf("spark.task.cpus") or 1)
    own_cpus = int(amount) if amount.is_integer() else amount  # Spark 4.3 takes fractions
    own_gpus = float(access.conf("spark.task.resource.gpu.amount") or 0)
    if cpus_per_worker in {None, own_cpus} and gpus_per_worker in {None, own_gpus}:
        return None
    instead = [f"spark.task.cpus={cpus_per_worker}"] if cpus_per_worker is not None else []
    if gpus_per_worker is not None:
        instead.append(f"spark.task.resource.gpu.amount={gpus_per_worker}")
    properties = " and ".join(instead)
    if is_local(spark):
        raise PreflightError(
            f"cpus_per_worker={cpus_per_worker}, gpus_per_worker={gpus_per_worker}: stage-level scheduling does not exist on "
            f"a local master. Start the session with {properties} instead"
            f"{', or set device=' + repr('cuda:0') if gpus_per_worker else ''}."
        )
    if pyspark.__version__.startswith("3."):
        raise PreflightError(
            f"cpus_per_worker={cpus_per_worker}, gpus_per_worker={gpus_per_worker}: DataFrame stages take a resource profile "
            f"from Spark 4.0 on; this is {pyspark.__version__}. Start the application with {properties} instead."
        )
    executor_gpus = access.conf("spark.executor.resource.gpu.amount")
    if gpus_per_worker and not access.connect and float(executor_gpus or 0) < gpus_per_worker:
        raise PreflightError(
            f"gpus_per_worker={gpus_per_worker}, but executors have spark.executor.resource.gpu.amount="
            f"{executor_gpus or 'unset'}. Start the application with at least that many, and "
            "spark.executor.resource.gpu.discoveryScript."
        )
    from pyspark.resource import ResourceProfileBuilder, TaskResourceRequests

    requests = TaskResourceRequests().cpus(cpus_per_worker if cpus_per_worker is not None else own_cpus)
    if gpus_per_worker is not None:
        requests = requests.resource("gpu", gpus_per_worker)
    profile = ResourceProfileBuilder().require(requests).build
    if access.connect:
        return profile  # made on the server with the first stage, which fails if it cannot be
    try:
        # Spark would register it with the first stage, but slots can be counted only for a profile that it knows.
        context: Any = spark.sparkContext._jsc.sc()
        context.resourceProfileManager().addResourceProfile(profile._java_resource_profile)
    except Py4JJavaError as error:
        reason = str(error.java_exception.getMessage())
        raise PreflightError(
            f"cpus_per_worker={cpus_per_worker}, gpus_per_worker={gpus_per_worker}: Spark refuses a resource profile here: "
            f"{reason} Start the application with {properties} instead."
        ) from error
    return profile


def check_slots(spark: SparkSession, num_workers: int, profile: Any, *, timeout_s: float) -> None:
    """Wait until there are `num_workers` slots; executors may still be starting.

    Where the session does not tell (Spark Connect) this does nothing: `transports.probe` finds out.

    Raises:
        PreflightError: there are fewer after `timeout_s` (at once on a local master).
    """
    access = access_to(spark)
    deadline = time.monotonic() + (0.0 if is_local(spark) else timeout_s)
    while (slots := access.slots(profile)) is not None and slots < num_workers:
        if time.monotonic() >= deadline:
            raise PreflightError(
                f"num_workers={num_workers}, but the session has {slots} slot(s) (master {access.master}): every "
                "replica needs one at the same time. Lower num_workers, or start the application with more: "
                "spark.executor.instances x spark.executor.cores / spark.task.cpus, or local[n]."
            )
        time.sleep(0.25)
