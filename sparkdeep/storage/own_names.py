"""Our own classes as files name them: `sparkdeep:SlowMo`, wherever in the package their module lies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["SAID_LATER", "name_of", "with_first_modules", "without_modules"]

_OURS: Final = re.compile(r"sparkdeep(?:\.\w+)*:(\w+(?:\.\w+)*)")
_IN_JSON: Final = re.compile(r'"sparkdeep:(\w+)')
_FIRST_MODULES: Final = {
    **dict.fromkeys(("Median", "NormClip", "RadialDirectional", "TrimmedMean"), "aggregators"),
    **dict.fromkeys(("AdaComm", "DyLU", "Epochs", "PostLocal", "QSR", "WarmStart"), "local_work"),
    **dict.fromkeys(("DelayedNesterov", "Downpour", "FedAdam", "FedYogi", "SlowMo"), "outer_optimizers"),
    **dict.fromkeys(("FedProx", "Scaffold"), "drift"),
    **dict.fromkeys(("Clock", "LightningStep", "ModuleLog"), "lightning_module"),
    "Asynchronous": "asynchrony",
    "Carrier": "injection",
    "EarlyStopping": "config",
    "FieldDecoder": "data.codecs",
    "LightningOptimizer": "lightning_optimizer",
    "OwnLoss": "interop",
    "UnischemaField": "data.unischema",
}


def name_of(value: Any) -> str:
    """A class or function as "module:qualified.name", and one of ours as "sparkdeep:qualified.name"."""
    return _shortened(f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', '')}")


SAID_LATER: Final = frozenset({"buffers", "details"})
"""Keys of a run's identity that the first version's checkpoints do not have."""


def without_modules(value: Any) -> Any:
    """A JSON value in which our own classes go as `name_of` says; the first version wrote their modules too."""
    if isinstance(value, str):
        return _shortened(value)
    if isinstance(value, Mapping):
        return {key: without_modules(one) for key, one in value.items()}
    return [without_modules(one) for one in value] if isinstance(value, list) else value


def with_first_modules(text: str) -> str:
    """JSON text in which our own classes have the modules that they had in the first version.

    Digests of such texts are names of folders, which are looked for again.
    """
    return _IN_JSON.sub(_in_first_module, text)


def _in_first_module(name: re.Match[str]) -> str:
    return f'"sparkdeep.{_FIRST_MODULES[name[1]]}:{name[1]}' if name[1] in _FIRST_MODULES else name[0]


def _shortened(name: str) -> str:
    ours = _OURS.fullmatch(name)
    return name if ours is None else f"sparkdeep:{ours[1]}"
