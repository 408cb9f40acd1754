"""`sparkdeep.doctor(spark)`: looks at a session in seconds, and says what to change before anything trains."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pyspark
from pyspark.sql import SparkSession

from sparkdeep.errors import ConfigError, PreflightError, ReplicaLostError, SparkdeepError
from sparkdeep.protocol.messages import Hello
from sparkdeep.protocol.wire import Connection
from sparkdeep.spark.doctor.conf_checks import KEYS, check_conf
from sparkdeep.spark.doctor.conf_values import TORCH_WORKER_BYTES, Conf, expected_slots
from sparkdeep.spark.doctor.executor_checks import Sight, check_sights
from sparkdeep.spark.doctor.findings import Finding, Report
from sparkdeep.spark.doctor.probes import MAX_TASKS, Look, look, package_versions
from sparkdeep.spark.session.access import ENCRYPTED_CONNECTIONS, access_to, is_connect
from sparkdeep.spark.session.preflight import is_local, task_profile
from sparkdeep.stages.coordinator import Coordinator, parse_ports

__all__ = ["doctor", "open_session"]

_ANSWER_TIMEOUT_S: Final = 5.0
# Slots cannot be counted through Connect: a stage that gets none is given up after this long.
_GUESS_TIMEOUT_S: Final = 10.0


def doctor(
    spark: SparkSession,
    *,
    num_workers: int | None = None,
    cpus_per_worker: int | None = None,
    gpus_per_worker: int | None = None,
    coordinator_host: str | None = None,
    coordinator_port: int | tuple[int, int] | str | None = None,
    timeout_s: float = 30.0,
) -> Report:
    """Look at a session, and say what to change before anything trains; print what it returns.

    It reads the Spark properties, runs one tiny barrier stage on all slots (at most 128), whose tasks report their
    versions, GPUs and disks and dial a port on the driver, and cleans up. Nothing is changed. A warm session takes a
    second or two.

    Args:
        spark: the session, classic or Spark Connect.
        num_workers: replicas that must fit at the same time; default: as many as there are slots.
        cpus_per_worker: as for `TorchEstimator`.
        gpus_per_worker: as for `TorchEstimator`.
        coordinator_host: as for `TorchEstimator`.
        coordinator_port: as for `TorchEstimator`.
        timeout_s: for executors to come, and for each of at most three small jobs.

    Returns:
        Findings; what is wrong with the session is among them, and is not raised.

    Raises:
        ConfigError: an argument cannot be meant.
    """
    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"num_workers={num_workers!r}: must be at least 1.")
    if not timeout_s > 0:
        raise ConfigError(f"timeout_s={timeout_s!r}: must be positive.")
    ports = parse_ports(coordinator_port)
    began = time.perf_counter()
    driver = package_versions()
    tag = f"sparkdeep-doctor-{secrets.token_hex(4)}"
    findings = [_session(spark, driver)]
    if is_connect(spark):
        name = f"Spark {spark.version} through Spark Connect"
        conf = _visible(spark)
        seen, sights = _connect(spark, tag, num_workers, timeout_s)
    else:
        name = f"Spark {spark.version}, {spark.sparkContext.master}"
        conf = dict(spark.sparkContext.getConf().getAll())
        with contextlib.ExitStack() as stack:
            job, port = stack.enter_context(_listening(conf, tag, coordinator_host, ports))
            profile, profiled = _profile(spark, cpus_per_worker, gpus_per_worker)
            seen, sights = _classic(spark, job, profile, num_workers, timeout_s)
        seen = [*profiled, *seen, *port]
    measured = [s.resident_bytes for s in sights if "torch" in s.versions]
    findings += check_conf(conf, worker_bytes=max(measured, default=TORCH_WORKER_BYTES), complete=not is_connect(spark))
    findings += seen
    if sights:
        findings += check_sights(sights, driver)
    return Report(session=name, findings=tuple(findings), seconds=time.perf_counter() - began)


def open_session(
    *, master: str | None, remote: str | None, conf: Mapping[str, str], properties_file: str | None
) -> Any:
    """Start a session for the command line; this interpreter runs the Python workers unless the environment says else.

    Raises:
        ConfigError: the properties file is not there.
    """
    if properties_file is not None and not Path(properties_file).is_file():
        raise ConfigError(f"--properties-file {properties_file}: there is no such file.")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if properties_file is not None:
        given = os.environ.get("PYSPARK_SUBMIT_ARGS", "pyspark-shell")
        os.environ["PYSPARK_SUBMIT_ARGS"] = f'--properties-file "{properties_file}" {given}'
    builder: Any = SparkSession.builder.appName("sparkdeep doctor")
    if master is not None:
        builder = builder.master(master)
    if remote is not None:
        builder = builder.remote(remote)
    for key, value in conf.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    if not is_connect(session):
        session.sparkContext.setLogLevel("ERROR")  # the report says what a warning of Spark's would say
    return session


def _session(spark: SparkSession, driver: Mapping[str, str]) -> Finding:
    major, minor = (int(part) for part in pyspark.__version__.split(".")[:2])
    seen = f"pyspark {pyspark.__version__}, Spark {spark.version}, Python {driver['python']}"
    if not (3, 5) <= (major, minor) < (5, 0) or sys.version_info < (3, 11):
        return Finding(
            name="session",
            level="fail",
            seen=f"{seen}.",
            change="install pyspark>=3.5,<5 and Python 3.11 or newer.",
        )
    kind = "Spark Connect, without a SparkContext: parameters travel through Spark" if is_connect(spark) else "classic"
    return Finding(name="session", level="ok", seen=f"{seen}; {kind}.")


def _visible(spark: SparkSession) -> dict[str, str]:
    return {key: value for key in KEYS if (value := spark.conf.get(key, None)) is not None}


@contextlib.contextmanager
def _listening(
    conf: Mapping[str, str], tag: str, coordinator_host: str | None, ports: range
) -> Iterator[tuple[Look, list[Finding]]]:
    """The driver's port, opened as a fit opens it, and answering every task that dials it with the right token."""
    host = conf.get("spark.driver.host", "localhost")
    try:
        coordinator = Coordinator(
            bind_host=conf.get("spark.driver.bindAddress", host),
            advertised_host=coordinator_host or host,
            ports=ports,
            tls=any(Conf(conf).true(key) for key in ENCRYPTED_CONNECTIONS),
        )
    except ConfigError as error:
        yield Look(tag=tag, host="", port=0, token=b""), [_failed("driver's port", error)]
        return

    def answer(hello: Hello, connection: Connection) -> None:
        connection.send("seen", {"replica": hello.replica}, timeout_s=_ANSWER_TIMEOUT_S)
        connection.close()

    coordinator.route(answer)
    try:
        address = coordinator.address
        job = Look(
            tag=tag, host=address.host, port=address.port, token=coordinator.token, certificate=address.certificate
        )
        yield job, []
    finally:
        coordinator.close()


def _profile(spark: SparkSession, cpus: int | None, gpus: int | None) -> tuple[Any, list[Finding]]:
    try:
        profile = task_profile(spark, cpus, gpus)
    except PreflightError as error:
        return None, [_failed("resource profile", error)]
    if profile is None:
        return None, []
    return profile, [
        Finding(name="resource profile", level="ok", seen=f"cpus_per_worker={cpus}, gpus_per_worker={gpus}.")
    ]


def _classic(
    spark: SparkSession, job: Look, profile: Any, num_workers: int | None, timeout_s: float
) -> tuple[list[Finding], list[Sight]]:
    slots = _wait_for_slots(spark, profile, num_workers, timeout_s)
    findings = [_slots(spark, slots, num_workers)]
    if slots == 0:
        return findings, []
    num_tasks = min(slots, MAX_TASKS)
    finding, sights = _barrier(spark, job, num_tasks, profile, timeout_s)
    findings.append(finding)
    if not sights:
        plain, sights = _plain(spark, job, num_tasks, timeout_s)
        findings += plain
    executors = access_to(spark).executors() or 0
    met = len({sight.executor for sight in sights})
    if sights and met < executors:
        findings.append(
            Finding(name="executors", level="warn", seen=f"{len(sights)} tasks met {met} of {executors} executors.")
        )
    return findings, sights


def _wait_for_slots(spark: SparkSession, profile: Any, num_workers: int | None, timeout_s: float) -> int:
    conf = dict(spark.sparkContext.getConf().getAll())
    wanted: int = num_workers or 1
    if num_workers is None:
        with contextlib.suppress(ConfigError):  # named by check_conf
            wanted = expected_slots(conf) or 1
    deadline = time.monotonic() + (0.0 if is_local(spark) else timeout_s)
    access = access_to(spark)
    while (slots := access.slots(profile) or 0) < wanted and time.monotonic() < deadline:
        time.sleep(0.25)
    return slots


def _slots(spark: SparkSession, slots: int, num_workers: int | None) -> Finding:
    more = "start the application with more: spark.executor.instances x spark.executor.cores / spark.task.cpus, or local[n]"
    if slots < (num_workers or 1):
        return Finding(
            name="slots",
            level="fail",
            seen=f"{slots} on {spark.sparkContext.master}; every replica needs one at the same time"
            f"{f', and num_workers={num_workers}' if num_workers else ''}.",
            change=f"{f'lower num_workers, or {more}' if slots else more}.",
        )
    return Finding(name="slots", level="ok", seen=f"{slots}: num_workers can be up to that.")


def _barrier(
    spark: SparkSession, job: Look, num_tasks: int, profile: Any, timeout_s: float
) -> tuple[Finding, list[Sight]]:
    began = time.perf_counter()
    name = "barrier stages"
    try:
        sights = look(spark, job, num_tasks, barrier=True, profile=profile, timeout_s=timeout_s)
    except ReplicaLostError as error:
        return Finding(
            name=name,
            level="fail",
            seen=f"{str(error).rstrip('.')}; it has {num_tasks} task(s), which need as many free slots at once.",
            change="let the session's other jobs end, or look why executors are lost; a fit waits open_timeout_s for them.",
        ), []
    except Exception as error:  # noqa: BLE001 (what Spark refuses is what the report is for)
        return _failed(name, error), []
    if not all(sight.barrier for sight in sights):
        return Finding(
            name=name,
            level="fail",
            seen="this engine ran mapInArrow(barrier=True) without a barrier.",
            change="disable native execution (Photon, Gluten, Comet, RAPIDS) for this session.",
        ), sights
    seen = f"one of {num_tasks} task(s) ran in {time.perf_counter() - began:.1f} s."
    return Finding(name=name, level="ok", seen=seen), sights


def _plain(
    spark: SparkSession, job: Look, num_tasks: int | None, timeout_s: float
) -> tuple[list[Finding], list[Sight]]:
    try:
        return [], look(spark, job, num_tasks, barrier=False, profile=None, timeout_s=timeout_s)
    except Exception as error:  # noqa: BLE001 (as above)
        return [_failed("plain tasks", error)], []


def _connect(
    spark: SparkSession, tag: str, num_workers: int | None, timeout_s: float
) -> tuple[list[Finding], list[Sight]]:
    job = Look(tag=tag, host="", port=0, token=b"")
    findings, sights = _plain(spark, job, None, timeout_s)
    if not sights:
        return findings, []
    asked = min(num_workers or len(sights), MAX_TASKS)
    finding, seen = _barrier(spark, job, asked, None, min(timeout_s, _GUESS_TIMEOUT_S))
    if not seen and num_workers is None and asked > 1:
        asked = 1  # Spark's default parallelism may be more than the slots that there are
        finding, seen = _barrier(spark, job, asked, None, min(timeout_s, _GUESS_TIMEOUT_S))
    findings.append(finding)
    if seen:
        findings.append(
            Finding(name="slots", level="ok", seen=f"at least {asked}; Spark Connect does not tell how many there are.")
        )
    return findings, seen or sights


def _failed(name: str, error: Exception) -> Finding:
    if isinstance(error, SparkdeepError):
        return Finding(name=name, level="fail", seen=str(error))  # names its remedy itself
    line = next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)
    return Finding(
        name=name,
        level="fail",
        seen=f"{type(error).__name__}: {line[:600]}",
        change="see the message; on Databricks take a cluster in dedicated access mode.",
    )
