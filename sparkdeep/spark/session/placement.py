"""Which device a replica computes on: the GPU that Spark gave its task, seen through CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

from collections.abc import Sequence

from sparkdeep.errors import ConfigError

__all__ = ["resolve_device"]


def resolve_device(setting: str, addresses: Sequence[str], visible: str | None) -> str:
    """The torch device for a task.

    Spark never sets CUDA_VISIBLE_DEVICES, and neither do we: torch numbers the devices that are visible from 0, so
    an address is looked up among them. Where the container renumbers its GPUs (YARN, Kubernetes), addresses are
    already positions.

    Args:
        setting: "auto", or a torch device that overrides what Spark gave.
        addresses: `TaskContext.resources()["gpu"].addresses`, empty without GPU scheduling.
        visible: the value of CUDA_VISIBLE_DEVICES, None when unset.

    Raises:
        ConfigError: several GPUs for one task, or an address that is not visible.
    """
    if setting != "auto":
        return setting
    if not addresses:
        return "cpu"
    if len(addresses) > 1:
        raise ConfigError(
            f"Spark gave the task {len(addresses)} GPUs ({', '.join(addresses)}); a replica computes on one. Set "
            "gpus_per_worker=1 (or spark.task.resource.gpu.amount=1) and raise num_workers."
        )
    address = addresses[0].strip()
    if visible is None or not visible.strip():
        if address.isdigit():
            return f"cuda:{address}"
        raise ConfigError(
            f"Spark gave the task GPU {address!r}, which is no number; set CUDA_VISIBLE_DEVICES to the list of such names "
            "on the executors, so that torch can number them."
        )
    names = [name.strip() for name in visible.split(",")]
    if address in names:
        return f"cuda:{names.index(address)}"
    if address.isdigit() and int(address) < len(names) and not all(name.isdigit() for name in names):
        return f"cuda:{address}"
    raise ConfigError(
        f"Spark gave the task GPU {address!r}, but CUDA_VISIBLE_DEVICES={visible!r} does not list it. Let the discovery "
        "script print the names that are visible on the executor, or unset CUDA_VISIBLE_DEVICES there."
    )
