"""Versions: those that driver and executors must share, and those that a run's outcome depends on."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, Final

import torch

from sparkdeep import __version__

__all__ = ["package_versions", "stamp", "versions"]

_PACKAGES: Final = ("sparkdeep", "torch", "pyspark", "pyarrow", "numpy")


def versions() -> dict[str, str]:
    """What must agree between driver and executors."""
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        # A driver without a GPU may have torch's CPU build: "+cpu" and "+cu128" are the same release.
        "torch": torch.__version__.split("+")[0],
        "sparkdeep": __version__,
    }


def stamp() -> dict[str, Any]:
    """Return when and with which versions a manifest was written."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": metadata.version("torch"),
            "sparkdeep": __version__,
        },
    }


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run's outcome depends on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
