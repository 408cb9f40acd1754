"""A trained network as one file for other runtimes: a torch.export program, or ONNX."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Collection, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from sparkdeep.errors import ConfigError
from sparkdeep.models.losses import forward
from sparkdeep.models.program import Program

__all__ = ["exported"]

_FORMATS: Final = ("torch", "onnx")


class _Prepared(nn.Module):
    """`preprocess` and the network as one module."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.network = program.model
        self.preprocess = program.preprocess  # a module's buffers travel along

    def forward(self, features: Any) -> Any:
        return forward(self.network, self.preprocess(features) if self.preprocess is not None else features)


def exported(
    program: Program,
    features: Tensor | dict[str, Tensor],
    format: str = "torch",
    ragged: Collection[str | None] = (),
) -> bytes:
    """The network, with `preprocess` where there is one, as a file's content.

    Its inputs are `features`: a tensor, or tensors by the names of the arguments of `forward`; with `preprocess`, one
    argument `features`, as that takes it. Dimension 0 is any number of rows, the others are those of `features`.

    Args:
        program: with the model on the CPU.
        features: of a batch of at least two rows, whose values do not matter.
        format: "torch" for what `torch.export.load` reads, "onnx" for ONNX.
        ragged: names of the tensors (None for an unnamed one) whose further dimensions may have any size too.

    Raises:
        ConfigError: an unknown format, a package that is not installed, or what torch cannot export, with its reason.
    """
    if format not in _FORMATS:
        raise ConfigError(f"format={format!r}: must be one of {list(_FORMATS)}.")
    if format == "onnx":
        _check_onnx()
    module = program.model.eval() if program.preprocess is None else _Prepared(program).eval()
    rows = torch.export.Dim("rows")

    def sizes(name: str | None, tensor: Tensor) -> dict[int, Any]:
        free = range(1, tensor.dim()) if name in ragged else ()
        return {0: rows, **dict.fromkeys(free, torch.export.Dim.AUTO)}

    of_features = (
        {name: sizes(name, one) for name, one in features.items()}
        if isinstance(features, dict)
        else sizes(None, features)
    )
    by_name = isinstance(features, dict) and program.preprocess is None
    args: Any = () if by_name else (features,)
    kwargs: Any = features if by_name else {}
    shapes: Any = of_features if by_name else (of_features,)
    with _named(format), torch.no_grad():
        whole = torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
        if format == "onnx":
            return _onnx(whole)
        buffer = io.BytesIO()
        torch.export.save(whole, buffer)
        return buffer.getvalue()


def _onnx(whole: Any) -> bytes:
    made: Any = torch.onnx.export(whole, dynamo=True, verbose=False)
    return bytes(made.model_proto.SerializeToString())


def _check_onnx() -> None:
    try:
        for package in ("onnx", "onnxscript"):
            importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"format='onnx' needs the package {error.name!r}, which is not installed: pip install 'sparkdeep[onnx]'."
        ) from error


@contextlib.contextmanager
def _named(format: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own warnings about its own parts
            yield
    except Exception as error:
        raise ConfigError(
            f"the network cannot be exported as {format!r}: {type(error).__name__}: {_first_lines(error)}\nExport follows "
            "tensors only, and takes no decision by their values or by the number of rows: write forward and preprocess "
            "with torch's own operations, or save the model with model.save."
        ) from error


def _first_lines(error: Exception, limit: int = 12) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return "\n".join(lines[:limit])
