"""What a model gave: a tensor, or several parts by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["logits_of"]


def logits_of(output: Any) -> Any:
    """The logits of an output with several named parts, as transformers' models have; any other output as it is."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else output
