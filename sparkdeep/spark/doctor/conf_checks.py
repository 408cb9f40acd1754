"""What Spark properties alone say about training: pure functions of a mapping, for a running session and for files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Final

from sparkdeep.errors import ConfigError
from sparkdeep.spark.doctor.conf_values import MIB, TORCH_WORKER_BYTES, Conf, sharing
from sparkdeep.spark.doctor.findings import Finding, Level
from sparkdeep.spark.session.access import ENCRYPTED_CONNECTIONS, ENCRYPTED_DISKS

__all__ = ["KEYS", "check_conf"]

# The part of the overhead that the executor's JVM itself needs besides its heap: Spark's own minimum.
_JVM_BYTES: Final = 384 * MIB
_LOOPBACK: Final = re.compile(r"^(localhost|127\..*|::1|\[::1\])$")
_ENGINES: Final = {
    "com.nvidia.spark.SQLPlugin": "RAPIDS",
    "org.apache.gluten.GlutenPlugin": "Gluten",
    "io.glutenproject.GlutenPlugin": "Gluten",
    "org.apache.spark.CometPlugin": "Comet",
    "org.apache.comet.CometSparkSessionExtensions": "Comet",
}


def check_conf(
    properties: Mapping[str, str], *, worker_bytes: int = TORCH_WORKER_BYTES, complete: bool = True
) -> list[Finding]:
    """Look at Spark properties; what is not set has Spark's default.

    Args:
        properties: such as `SparkConf().getAll()` gives, or a properties file.
        worker_bytes: what a Python worker needs before it trains anything, where it was measured.
        complete: False where what is not set may also be hidden, as through Spark Connect: what cannot be seen is then
            unknown.
    """
    conf = Conf(properties, worker_bytes)
    findings = []
    hidden = []
    for name, keys, check in _CHECKS:
        if not complete and not any(conf.has(key) for key in keys):
            hidden.append(name)
            continue
        try:
            findings.append(check(conf))
        except ConfigError as error:
            findings.append(Finding(name=name, level="fail", seen=str(error), change="correct the property."))
    if hidden:
        findings.append(
            Finding(
                name="Spark's settings",
                level="unknown",
                seen=f"this session does not show what these depend on: {', '.join(hidden)}.",
                change="look at the cluster's own Spark configuration; check_conf in sparkdeep.spark.doctor.conf_checks reads it as a dict.",
            )
        )
    return findings


_SESSION_KILLS = "spark.sql.execution.pyspark.udf.killOnIdleTimeout"


def _dynamic_allocation(conf: Conf) -> Finding:
    if conf.true("spark.dynamicAllocation.enabled"):
        return Finding(
            name="dynamic allocation",
            level="fail",
            seen="spark.dynamicAllocation.enabled=true: Spark runs no barrier stage with it.",
            change="start the application with spark.dynamicAllocation.enabled=false and a fixed spark.executor.instances.",
        )
    return Finding(name="dynamic allocation", level="ok", seen="off.")


def _idle_workers(conf: Conf) -> Finding:
    name = "Python workers"
    for key in (_SESSION_KILLS, "spark.python.worker.killOnIdleTimeout"):
        if conf.true(key):
            return Finding(
                name=name,
                level="fail",
                seen=f"{key}=true: Spark would kill a replica that trains silently.",
                change=f"set {key}=false.",
            )
    if not conf.true("spark.python.worker.reuse", "true"):
        return Finding(
            name=name,
            level="warn",
            seen="spark.python.worker.reuse=false: every task starts a Python worker that imports torch anew (seconds).",
            change="set spark.python.worker.reuse=true, the default.",
        )
    return Finding(name=name, level="ok", seen="reused, and not killed when idle.")


def _memory(conf: Conf) -> Finding:
    name = "memory overhead"
    slots = max(1, conf.slots())
    heap = conf.memory("spark.executor.memory", "1g")
    default = conf.properties.get("spark.kubernetes.memoryOverheadFactor", "0.1")
    factor = conf.number("spark.executor.memoryOverheadFactor", default)
    overhead = max(conf.memory("spark.executor.minMemoryOverhead", "384m"), int(factor * heap))
    if conf.has("spark.executor.memoryOverhead"):
        overhead = conf.memory("spark.executor.memoryOverhead", "0")
    python = conf.memory("spark.executor.pyspark.memory", "0")
    worker = conf.worker_bytes
    if not conf.contained:
        return Finding(
            name=name,
            level="ok",
            seen=f"not limited by this master; beside the heap, a Python worker takes {_mib(worker)} with torch imported and "
            "nothing else.",
        )
    enough = _JVM_BYTES + 2 * slots * worker
    level: Level = "ok"
    if overhead + python < _JVM_BYTES + slots * worker:
        level = "fail"
    elif overhead + python < enough:
        level = "warn"
    return Finding(
        name=name,
        level=level,
        seen=f"{_mib(overhead + python)} beside the heap of {_mib(heap)}, for {slots} Python worker(s), each "
        f"{_mib(worker)} with torch imported and nothing else, and the JVM's own {_mib(_JVM_BYTES)}; an executor that needs more is killed (exit code 137, or 'running beyond physical memory').",
        change=""
        if level == "ok"
        else f"set spark.executor.memoryOverhead={math.ceil(enough / MIB / 256) * 256}m, and more for a large model: about "
        "16 bytes a parameter and slot with Adam, 8 with SGD, and the batches.",
    )


def _address_space(conf: Conf) -> Finding:
    name = "Python memory limit"
    if not conf.has("spark.executor.pyspark.memory"):
        return Finding(name=name, level="ok", seen="spark.executor.pyspark.memory is not set.")
    gpu = conf.number("spark.executor.resource.gpu.amount", "0") > 0
    size = conf.memory("spark.executor.pyspark.memory", "0")
    return Finding(
        name=name,
        level="fail" if gpu else "warn",
        seen=f"spark.executor.pyspark.memory={_mib(size)} limits the address space of Python workers (RLIMIT_AS), which "
        f"torch{' and CUDA reserve' if gpu else ' reserves'} far beyond what they use: allocations fail.",
        change="unset spark.executor.pyspark.memory, and add its size to spark.executor.memoryOverhead.",
    )


def _cores(conf: Conf) -> Finding:
    name = "cores"
    if conf.local:
        return Finding(name=name, level="ok", seen=f"spark.task.cpus={conf.task_cpus():g}.")
    if conf.master.startswith("spark://") and not conf.has("spark.executor.cores"):
        return Finding(
            name=name,
            level="ok",
            seen="spark.executor.cores is not set: on a standalone cluster an executor takes all cores of its worker.",
        )
    cores, cpus = conf.number("spark.executor.cores", "1"), conf.task_cpus()
    seen = f"spark.executor.cores={cores:g}, spark.task.cpus={cpus:g}"
    if cores < cpus:
        return Finding(
            name=name,
            level="fail",
            seen=f"{seen}: no task fits into an executor.",
            change=f"set spark.executor.cores={cpus:g} or more.",
        )
    if cores % cpus:
        return Finding(
            name=name,
            level="warn",
            seen=f"{seen}: {cores % cpus:g} core(s) of each executor stay idle.",
            change="make spark.executor.cores a multiple of spark.task.cpus.",
        )
    return Finding(name=name, level="ok", seen=f"{seen}: {cores // cpus:g} task(s) at a time by cores.")


def _gpus(conf: Conf) -> Finding:
    name = "GPU scheduling"
    held = conf.number("spark.executor.resource.gpu.amount", "0")
    wanted = conf.number("spark.task.resource.gpu.amount", "0")
    seen = f"spark.executor.resource.gpu.amount={held:g}, spark.task.resource.gpu.amount={wanted:g}"
    if not held and not wanted:
        return Finding(name=name, level="ok", seen="Spark schedules no GPUs; replicas compute on CPUs.")
    if wanted > held:
        return Finding(
            name=name,
            level="fail",
            seen=f"{seen}: no executor has what a task asks for.",
            change=f"set spark.executor.resource.gpu.amount={math.ceil(wanted)} or more.",
        )
    if not wanted:
        return Finding(
            name=name,
            level="warn",
            seen=f"{seen}: executors hold GPUs that no task is given.",
            change="set spark.task.resource.gpu.amount=1, or give the estimator gpus_per_worker=1.",
        )
    if wanted > 1:
        return Finding(
            name=name,
            level="fail",
            seen=f"{seen}: a replica computes on one GPU.",
            change="set spark.task.resource.gpu.amount=1, and raise num_workers.",
        )
    if not conf.master.startswith(("spark://", "local")) and not conf.has(
        "spark.executor.resource.gpu.discoveryScript"
    ):
        return Finding(
            name=name,
            level="fail",
            seen=f"{seen}, but executors cannot find out which GPUs they have: no executor starts.",
            change="set spark.executor.resource.gpu.discoveryScript to conf/gpu_discovery.sh, at its path on executors.",
        )
    if wanted < 1:
        return Finding(
            name=name,
            level="warn",
            seen=f"{seen}: {sharing(wanted)} replicas share a GPU and its memory.",
            change="set spark.task.resource.gpu.amount=1 for a GPU of its own.",
        )
    by_cores = int(conf.number("spark.executor.cores", "1") // conf.task_cpus())
    if conf.has("spark.executor.cores") and by_cores < held:
        return Finding(
            name=name,
            level="warn",
            seen=f"{seen}, but an executor's cores run {by_cores} task(s) at a time: {held - by_cores:g} GPU(s) stay idle.",
            change=f"set spark.executor.cores={held * conf.task_cpus():g} or more.",
        )
    return Finding(name=name, level="ok", seen=f"{seen}: one GPU a replica.")


def _engine(conf: Conf) -> Finding:
    given = conf.properties.get("spark.plugins", "") + "," + conf.properties.get("spark.sql.extensions", "")
    engines = sorted({engine for plugin, engine in _ENGINES.items() if plugin in given})
    if not engines:
        return Finding(name="native engine", level="ok", seen="none that is known to ignore barrier stages.")
    return Finding(
        name="native engine",
        level="warn",
        seen=f"{' and '.join(engines)} may run mapInArrow without its barrier; 'barrier stages' below tells.",
        change="if that fails, take the plugin out of spark.plugins and spark.sql.extensions for this application.",
    )


def _encryption(conf: Conf) -> Finding:
    name = "encryption"
    if conf.true(ENCRYPTED_DISKS):
        return Finding(
            name=name,
            level="fail",
            seen=f"{ENCRYPTED_DISKS}=true covers what Spark itself writes. Shards and replica states would lie in the clear on "
            "the executors' disks: a fit is refused.",
            change="have the system encrypt the volumes under spark.local.dir (and shard_dir), and say so to the estimator: "
            "encrypted_disks=True.",
        )
    asked = [key for key in ENCRYPTED_CONNECTIONS if conf.true(key)]
    if not asked:
        seen = "Spark encrypts neither disks nor connections; tls=True would encrypt the coordinator's port alone."
        return Finding(name=name, level="ok", seen=seen)
    return Finding(
        name=name,
        level="ok",
        seen=f"{', '.join(f'{key}=true' for key in asked)}: the coordinator's port speaks TLS 1.3 too (package 'cryptography' "
        "on the driver), and no ring is formed, whose connections would be in the clear.",
    )


def _barrier_settings(conf: Conf) -> Finding:
    name = "barrier settings"
    if conf.true("spark.locality.wait.legacyResetOnTaskLaunch"):
        return Finding(
            name=name,
            level="fail",
            seen="spark.locality.wait.legacyResetOnTaskLaunch=true: Spark aborts a barrier stage whose tasks do not all start "
            "at once.",
            change="unset spark.locality.wait.legacyResetOnTaskLaunch.",
        )
    key = "spark.scheduler.barrier.maxConcurrentTasksCheck.interval"
    if not conf.local and not conf.has(key):
        return Finding(
            name=name,
            level="warn",
            seen=f"{key} is 15 s, its default: after a lost executor a fit waits up to that long for its next look.",
            change=f"set {key}=2s.",
        )
    return Finding(name=name, level="ok", seen=f"{key}={conf.properties.get(key, '15s')}.")


def _driver_host(conf: Conf) -> Finding:
    host = conf.properties.get("spark.driver.host", "")
    elsewhere = conf.contained or (
        conf.master.startswith("spark://") and not _LOOPBACK.match(conf.master[8:].rsplit(":", 1)[0])
    )
    if elsewhere and _LOOPBACK.match(host):
        return Finding(
            name="driver address",
            level="fail",
            seen=f"spark.driver.host={host}: executors on other machines dial themselves.",
            change="set spark.driver.host to a name or address of the driver's machine that executors can reach.",
        )
    return Finding(name="driver address", level="ok", seen=f"{host or 'chosen by Spark'}.")


def _tmpfs(conf: Conf) -> Finding:
    if conf.true("spark.kubernetes.local.dirs.tmpfs"):
        return Finding(
            name="tmpfs",
            level="warn",
            seen="spark.kubernetes.local.dirs.tmpfs=true: shards lie in memory, and count against the pod's limit.",
            change="unset it, or raise spark.executor.memoryOverhead by the size of a shard for each slot.",
        )
    return Finding(name="tmpfs", level="ok", seen="not on tmpfs by Spark's settings.")


_CHECKS: Final[tuple[tuple[str, tuple[str, ...], Callable[[Conf], Finding]], ...]] = (
    ("dynamic allocation", ("spark.dynamicAllocation.enabled",), _dynamic_allocation),
    (
        "Python workers",
        (_SESSION_KILLS, "spark.python.worker.killOnIdleTimeout", "spark.python.worker.reuse"),
        _idle_workers,
    ),
    ("cores", ("spark.executor.cores", "spark.task.cpus"), _cores),
    ("GPU scheduling", ("spark.executor.resource.gpu.amount", "spark.task.resource.gpu.amount"), _gpus),
    ("memory overhead", ("spark.executor.memory", "spark.executor.memoryOverhead"), _memory),
    ("Python memory limit", ("spark.executor.pyspark.memory",), _address_space),
    ("barrier settings", ("spark.scheduler.barrier.maxConcurrentTasksCheck.interval",), _barrier_settings),
    ("native engine", ("spark.plugins", "spark.sql.extensions"), _engine),
    ("encryption", (ENCRYPTED_DISKS, *ENCRYPTED_CONNECTIONS), _encryption),
    ("driver address", ("spark.driver.host",), _driver_host),
    ("tmpfs", ("spark.kubernetes.local.dirs.tmpfs",), _tmpfs),
)
_FURTHER: Final = (
    "spark.executor.memoryOverheadFactor",
    "spark.executor.minMemoryOverhead",
    "spark.executor.resource.gpu.discoveryScript",
    "spark.kubernetes.memoryOverheadFactor",
    "spark.locality.wait.legacyResetOnTaskLaunch",
    "spark.master",
)
KEYS: Final = tuple(sorted({*_FURTHER, *(key for _, keys, _ in _CHECKS for key in keys)}))
"""The properties that the checks read, for sessions that cannot list theirs."""


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.0f} MiB"
