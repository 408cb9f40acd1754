"""What a run was, beside its rounds: for reports."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["About", "package_versions"]

_PACKAGES: Final = ("sparkdeep", "torch", "pyspark", "pyarrow", "numpy")


@dataclass(frozen=True, kw_only=True)
class About:
    """What a report says of a run beside its records; whatever is left out is not shown."""

    title: str = "Training run"
    """Shown on top."""
    status: str = ""
    """"done", "failed", or what else it should be called."""
    error: str = ""
    """Why it ended, if it failed."""
    num_rounds: int | None = None
    """Of the whole run."""
    rows: int | None = None
    """Training rows of all replicas together."""
    num_parameters: int | None = None
    """Trained numbers in the model."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Of the trained model on test rows."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """By name, as `FitInfo.settings`."""
    versions: Mapping[str, str] | None = None
    """By package; None: of this process."""


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run's outcome depends on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
