"""The loss that broadcasts in silence: (rows, 1) meets (rows,), and (rows, rows) numbers are averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["BroadcastWatch"]

_ELEMENTWISE: Final = {
    *("add", "radd", "sub", "rsub", "mul", "rmul", "div", "rdiv", "truediv", "rtruediv"),
    *("subtract", "multiply", "divide", "true_divide"),
}


class BroadcastWatch(TorchFunctionMode):
    """Notices when the labels, or what was computed from them, broadcast against something else to (rows, rows).

    Only sums, differences, products and quotients of (rows, 1) and (rows,) count, and only where one of the two comes
    from the labels and the other does not: all pairs of labels, or all pairs of outputs, are what a contrastive loss
    means.

    Args:
        rows: of the batch.
        labels: a tensor, or a dict of them.
    """

    def __init__(self, rows: int, labels: Any) -> None:
        super().__init__()
        self._rows = rows
        # By identity, and held, so that no other tensor gets the same one.
        self._from_labels: dict[int, Tensor] = {id(tensor): tensor for tensor in _tensors(labels)}
        self.found = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, and look at what came of which shapes."""
        del types
        result = func(*args, **(kwargs or {}))
        given = list(_tensors([*args, *(kwargs or {}).values()]))
        known = [id(tensor) in self._from_labels for tensor in given]
        if any(known):
            self._from_labels |= {id(tensor): tensor for tensor in _tensors(result)}
        name = getattr(func, "__name__", "").strip("_")
        if name in _ELEMENTWISE and len(given) == 2 and sum(known) == 1 and self._rows > 1:
            shapes = {tuple(tensor.shape) for tensor in given}
            self.found = self.found or shapes == {(self._rows, 1), (self._rows,)}
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
