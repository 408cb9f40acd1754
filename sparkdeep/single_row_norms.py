"""Batch norms of a replica whose shard has a single row, which has no variance."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["single_row_norms"]


class single_row_norms:  # noqa: N801 (reads as a verb at its one call site)
    """Batch norms use their running statistics while a shard of one row trains: one row has no variance."""

    def __init__(self, model: nn.Module) -> None:
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]

    def __enter__(self) -> None:
        for norm in self._norms:
            norm.eval()

    def __exit__(self, *_: object) -> None:
        for norm in self._norms:
            norm.train()
