"""A network of this machine's own: a namespace a node, one switch, and a cap on every cable, both ways.

Needs root and iproute2. What is made here is removed here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["DEVICE", "address_of", "capped_network", "enter", "why_not"]

DEVICE: Final = "cable"
"""The network device of every node."""
_CLONE_NEWNET: Final = 0x40000000
_FOLDER: Final = Path("/run/netns")


def why_not() -> str:
    """Why no such network can be made here; empty when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} of iproute2 missing" if missing else ""


def enter(namespace: str) -> None:
    """Move this process, before it has other threads, into a namespace."""
    library = ctypes.CDLL(None, use_errno=True)
    with (_FOLDER / namespace).open("rb") as file:
        if library.setns(file.fileno(), _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot enter the network namespace {namespace}: {os.strerror(number)}")


def address_of(node: int) -> str:
    """The IPv4 address of a node."""
    return f"10.213.77.{node + 1}"


@contextlib.contextmanager
def capped_network(nodes: int, megabits: int) -> Iterator[list[str]]:
    """A switch with `nodes` nodes, each on a cable of `megabits` Mb/s in either direction; gives the namespaces' names.

    Raises:
        RuntimeError: `ip` or `tc` failed, with what it said.
    """
    prefix = f"sparkdeep-{os.getpid()}"
    switch, names = f"{prefix}-switch", [f"{prefix}-{node}" for node in range(nodes)]
    made: list[str] = []
    try:
        for name in [switch, *names]:
            _call("ip", "netns", "add", name)
            made.append(name)
        _call("ip", "-n", switch, "link", "add", "name", "switch", "type", "bridge")
        _call("ip", "-n", switch, "link", "set", "switch", "up")
        for node, name in enumerate(names):
            plug = f"plug{node}"
            _call("ip", "link", "add", DEVICE, "netns", name, "type", "veth", "peer", "name", plug, "netns", switch)
            _call("ip", "-n", name, "address", "add", f"{address_of(node)}/24", "dev", DEVICE)
            _call("ip", "-n", switch, "link", "set", plug, "master", "switch")
            for where, device in ((name, "lo"), (name, DEVICE), (switch, plug)):
                _call("ip", "-n", where, "link", "set", device, "up")
            for where, device in ((name, DEVICE), (switch, plug)):
                rate = ["rate", f"{megabits}mbit", "burst", "512kb", "latency", "50ms"]
                _call("tc", "-n", where, "qdisc", "add", "dev", device, "root", "tbf", *rate)
        yield names
    finally:
        for name in made:
            _call("ip", "netns", "delete", name)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)  # noqa: S603
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
