"""Spark properties as typed values: sizes, counts, and how many tasks an executor runs at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, final

from sparkdeep.errors import ConfigError

__all__ = ["MIB", "TORCH_WORKER_BYTES", "Conf", "expected_slots", "memory_bytes", "sharing", "slots_per_executor"]

MIB: Final = 1 << 20
TORCH_WORKER_BYTES: Final = 350 * MIB
"""Resident memory of a Python worker that has imported torch and sparkdeep, and trains nothing yet (torch 2.13, CPU)."""

_LEAST: Final = 1e-9
_MOST: Final = 1e15


_UNITS: Final = {"": 1, "b": 1, "k": 1 << 10, "m": MIB, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}


@final
@dataclass(frozen=True)
class Conf:
    """Typed access to properties.

    Raises (all methods):
        ConfigError: a property is malformed; the message names it.
    """

    properties: Mapping[str, str]
    worker_bytes: int = TORCH_WORKER_BYTES
    """What a Python worker needs before it trains anything."""
    master: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "master", self.properties.get("spark.master", ""))

    @property
    def local(self) -> bool:
        """Whether driver and executor are one process."""
        return self.master == "local" or self.master.startswith("local[")

    @property
    def contained(self) -> bool:
        """Whether the cluster manager kills an executor that outgrows its memory."""
        return self.master.startswith(("yarn", "k8s://"))

    def has(self, key: str) -> bool:
        """Whether `key` is set."""
        return key in self.properties

    def true(self, key: str, default: str = "false") -> bool:
        """Whether a switch is on."""
        return self.properties.get(key, default).strip().lower() == "true"

    def number(self, key: str, default: str) -> float:
        """An amount."""
        text = self.properties.get(key, default)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        # Amounts beyond these are typos, and their quotients overflow.
        if value != 0 and not _LEAST <= value <= _MOST:
            raise ConfigError(f"{key}={text[:100]!r}: must be 0, or a number from {_LEAST:g} to {_MOST:g}.")
        return value

    def memory(self, key: str, default: str) -> int:
        """A size in bytes; a bare number counts in MiB, as in Spark's memory settings."""
        return memory_bytes(key, self.properties.get(key, default), unit="m")

    def task_cpus(self) -> float:
        """CPUs of a task; Spark 4.3 also takes fractions."""
        cpus = self.number("spark.task.cpus", "1")
        if cpus == 0:
            raise ConfigError("spark.task.cpus=0: must be more than 0.")
        return cpus

    def slots(self) -> int:
        """How many tasks an executor runs at a time: by its cores and, where tasks ask for GPUs, by those."""
        slots = int(self.number("spark.executor.cores", "1") // self.task_cpus())
        per_task = self.number("spark.task.resource.gpu.amount", "0")
        if per_task > 0:
            gpus = int(self.number("spark.executor.resource.gpu.amount", "0"))
            slots = min(slots, gpus * sharing(per_task) if per_task < 1 else int(gpus // per_task))
        return slots


def sharing(amount: float) -> int:
    """How many tasks share a GPU when each asks for a fraction `amount` of it: a whole number, as Spark counts."""
    return math.floor(1 / amount + 1e-9)


def memory_bytes(key: str, text: str, *, unit: str = "b") -> int:
    """A Spark size such as "4g" or "512m" in bytes; a bare number counts in `unit`.

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d{1,18})\s*([kmgtp]?)i?b?\s*", text.lower())
    if match is None:
        raise ConfigError(f"{key}={text[:100]!r}: must be a size such as 4g or 512m.")
    return int(match[1]) * _UNITS[unit if text.strip().isdigit() else match[2]]


def slots_per_executor(conf: Mapping[str, str]) -> int:
    """How many tasks an executor runs at a time: by its cores and, where tasks ask for GPUs, by those.

    Raises:
        ConfigError: a malformed amount, or tasks that ask for no CPU.
    """
    return Conf(conf).slots()


def expected_slots(conf: Mapping[str, str]) -> int | None:
    """Slots when all executors are there; None where the properties do not say how many there will be.

    Raises:
        ConfigError: as `slots_per_executor`.
    """
    read = Conf(conf)
    if read.master.startswith("spark://"):
        # There the number of executors is a matter of their cores; spark.executor.instances is not read.
        if not (read.has("spark.cores.max") and read.has("spark.executor.cores")):
            return None
        executors = read.number("spark.cores.max", "0") // max(1.0, read.number("spark.executor.cores", "1"))
    elif read.contained and read.has("spark.executor.instances"):
        executors = read.number("spark.executor.instances", "0")
    else:
        return None
    return int(executors) * read.slots()
