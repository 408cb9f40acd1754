"""What tasks saw where they ran, judged: versions, GPUs, the way to the driver, disks; no Spark needed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, final

from sparkdeep.spark.doctor.findings import Finding, Level
from sparkdeep.storage.disks import MEMORY_KINDS

__all__ = ["LocalDir", "Sight", "check_sights", "sight_from_json", "sight_to_json"]

_GIB: Final = 1 << 30
_LEAST_FREE_BYTES: Final = _GIB
_COMFORTABLE_BYTES: Final = 10 * _GIB
_MUST_AGREE: Final = ("python", "torch", "sparkdeep")
_SHOULD_AGREE: Final = ("numpy", "pyarrow", "pyspark")


@final
@dataclass(frozen=True, kw_only=True)
class LocalDir:
    """One of an executor's local directories."""

    path: str
    free_bytes: int
    kind: str
    """Of its file system, such as "ext4" or "tmpfs"; "" where the system does not tell."""


@final
@dataclass(frozen=True, kw_only=True)
class Sight:
    """What one task saw."""

    task: int
    host: str
    executor: str
    """Names the executor within the application."""
    barrier: bool
    """Whether the task ran in a barrier stage."""
    cpus: int
    versions: Mapping[str, str]
    """By package; those that are not installed are not listed."""
    gpus: Sequence[str]
    """Addresses that Spark gave the task."""
    cuda_devices: int
    """CUDA devices that torch sees there."""
    device: str
    """The torch device on which a replica would compute; "" with `device_problem`."""
    device_problem: str
    dial_s: float | None
    """Seconds from dialing the driver's port to its answer; None when it was not dialed or did not answer."""
    dial_problem: str
    resident_bytes: int
    """Of the Python worker, with torch imported."""
    address_limit_bytes: int | None
    """RLIMIT_AS of the Python worker; None for no limit."""
    local_dirs: Sequence[LocalDir]


def sight_to_json(sight: Sight) -> str:
    """One line of JSON."""
    return json.dumps(dataclasses.asdict(sight))


def sight_from_json(text: str) -> Sight:
    """The inverse of `sight_to_json`."""
    content: dict[str, Any] = json.loads(text)
    return Sight(**{**content, "local_dirs": [LocalDir(**one) for one in content["local_dirs"]]})


def check_sights(sights: Sequence[Sight], driver: Mapping[str, str]) -> list[Finding]:
    """Judge what the tasks saw.

    Args:
        sights: at least one.
        driver: versions of the driver's own packages.
    """
    return [
        _versions(sights, driver),
        _gpus(sights),
        *_driver_port(sights),
        _local_dirs(sights),
        *_address_limit(sights),
    ]


def _versions(sights: Sequence[Sight], driver: Mapping[str, str]) -> Finding:
    must, should = _differing(sights, driver, _MUST_AGREE), _differing(sights, driver, _SHOULD_AGREE)
    if must or should:
        return Finding(
            name="versions",
            level="fail" if must else "warn",
            seen="; ".join([*must, *should]) + ".",
            change="install the driver's versions in the Python that executors run (spark.pyspark.python), or ship one "
            "environment to all with spark.archives.",
        )
    same = ", ".join(f"{name} {driver[name]}" for name in (*_MUST_AGREE, *_SHOULD_AGREE) if name in driver)
    return Finding(
        name="versions",
        level="ok",
        seen=f"the same on {len({s.executor for s in sights})} executor(s) and the driver: {same}.",
    )


def _differing(sights: Sequence[Sight], driver: Mapping[str, str], names: Iterable[str]) -> list[str]:
    return [
        f"{name} {version} on {hosts}, {driver.get(name, 'missing')} on the driver"
        for name in names
        for version, hosts in _hosts_by(sights, partial(_version, name)).items()
        if _release(version) != _release(driver.get(name, "missing"))
    ]


def _version(name: str, sight: Sight) -> str:
    return sight.versions.get(name, "missing")


def _gpus(sights: Sequence[Sight]) -> Finding:
    name = "GPUs"
    if problems := _hosts_by([s for s in sights if s.device_problem], lambda s: s.device_problem):
        return Finding(
            name=name,
            level="fail",
            seen="; ".join(f"{hosts}: {problem}" for problem, hosts in problems.items()),
            change="see the message; conf/gpu_discovery.sh prints addresses that fit.",
        )
    on_gpus = [s for s in sights if s.device.startswith("cuda")]
    if blind := [s for s in on_gpus if int(s.device.partition(":")[2] or 0) >= s.cuda_devices]:
        return Finding(
            name=name,
            level="fail",
            seen=f"Spark gave tasks GPUs (such as {blind[0].device} on {blind[0].host}), but torch there "
            f"({blind[0].versions.get('torch', 'missing')}) sees {blind[0].cuda_devices} CUDA device(s).",
            change="install a CUDA build of torch on the executors, and check the driver with nvidia-smi there.",
        )
    if idle := [s for s in sights if s.cuda_devices and not s.gpus]:
        return Finding(
            name=name,
            level="warn",
            seen=f"torch sees {idle[0].cuda_devices} CUDA device(s) on {idle[0].host}, but Spark gave the task none.",
            change="set spark.executor.resource.gpu.amount, spark.task.resource.gpu.amount=1 and "
            "spark.executor.resource.gpu.discoveryScript (see conf/), or gpus_per_worker=1; device='cuda:0' for one replica a "
            "machine.",
        )
    if given := sorted({f"{s.host} {s.device}" for s in sights if s.gpus}):
        return Finding(name=name, level="ok", seen=f"given by Spark and seen by torch: {', '.join(given)}.")
    return Finding(name=name, level="ok", seen="none; replicas compute on CPUs.")


def _driver_port(sights: Sequence[Sight]) -> list[Finding]:
    name = "driver's port"
    if problems := _hosts_by([s for s in sights if s.dial_problem], lambda s: s.dial_problem):
        return [
            Finding(
                name=name,
                level="fail",
                seen="; ".join(f"{hosts}: {problem}" for problem, hosts in problems.items()),
                change="set coordinator_host= and coordinator_port= (or spark.driver.host), and open that port in firewalls "
                "and network policies.",
            )
        ]
    times = [s.dial_s for s in sights if s.dial_s is not None]
    if not times:
        return []
    return [Finding(name=name, level="ok", seen=f"{len(times)} task(s) dialed it; {1000 * max(times):.0f} ms at most.")]


def _local_dirs(sights: Sequence[Sight]) -> Finding:
    name = "local directories"
    # A shard goes to the roomiest one.
    roomiest = {s.host: max(s.local_dirs, key=lambda d: d.free_bytes) for s in sights if s.local_dirs}
    if not roomiest:
        return Finding(
            name=name,
            level="unknown",
            seen="executors do not say where theirs are (SPARK_LOCAL_DIRS is not set in Python workers).",
            change="give the estimator shard_dir= if a fit finds none.",
        )
    host, least = min(roomiest.items(), key=lambda item: item[1].free_bytes)
    seen = f"{least.free_bytes / _GIB:.1f} GiB free for shards on {host} ({least.path}, {least.kind or 'kind unknown'})"
    seen += f", the least of {len(roomiest)} host(s)"
    level: Level = "ok"
    change = ""
    if in_memory := sorted(h for h, d in roomiest.items() if d.kind in MEMORY_KINDS):
        level = "warn"
        seen += f"; on {', '.join(in_memory)} it is memory ({roomiest[in_memory[0]].kind}), and shards count against it"
        change = "set spark.local.dir (SPARK_LOCAL_DIRS on YARN and standalone workers) to a disk."
    if least.free_bytes < _COMFORTABLE_BYTES:
        level = "fail" if least.free_bytes < _LEAST_FREE_BYTES else "warn"
        change = "set spark.local.dir to a disk with room for the rows and Spark's shuffle, or give shard_dir=."
    return Finding(name=name, level=level, seen=f"{seen}.", change=change)


def _address_limit(sights: Sequence[Sight]) -> list[Finding]:
    limits = [s.address_limit_bytes for s in sights if s.address_limit_bytes is not None]
    if not limits:
        return []
    return [
        Finding(
            name="address space",
            level="warn",
            seen=f"Python workers have RLIMIT_AS={min(limits) / _GIB:.1f} GiB: torch reserves far beyond what it uses, and "
            "CUDA more still.",
            change="unset spark.executor.pyspark.memory and any ulimit -v of the executors; raise "
            "spark.executor.memoryOverhead.",
        )
    ]


def _release(version: str) -> str:
    # "+cpu" and "+cu128" are the same release.
    return version.partition("+")[0]


def _hosts_by(sights: Sequence[Sight], key: Callable[[Sight], str]) -> dict[str, str]:
    groups: dict[str, set[str]] = {}
    for sight in sights:
        groups.setdefault(key(sight), set()).add(sight.host)
    return {
        value: ", ".join(sorted(hosts)[:8]) + (", ..." if len(hosts) > 8 else "") for value, hosts in groups.items()
    }
