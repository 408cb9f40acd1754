"""Between a module and a flat vector: where each trainable parameter lies, and what a module's other tensors are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from sparkdeep.errors import ConfigError, ProtocolError

__all__ = [
    "Entry",
    "Layout",
    "content_mark",
    "fill",
    "float_dtype_of",
    "named_tensors",
    "raw_bytes",
    "unlike",
    "variances_of",
]


_ROW: Final = 512


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One trainable parameter's place in the flat vector."""

    name: str
    """Its first name in `named_parameters()`; a tied parameter has one entry."""
    shape: tuple[int, ...]
    """Shape in the module."""
    dtype: torch.dtype
    """Dtype in the module; the vector may be wider (bfloat16 parameters lie in a float32 vector)."""
    offset: int
    """First element in the vector."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of `module`, each tied tensor once, non-persistent buffers included."""
    yield from module.named_parameters()
    yield from module.named_buffers()


@torch.no_grad()
def fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy tensors into the module's parameters and buffers of the same names; names that only one side has are ignored.

    Raises:
        ProtocolError: a tensor's shape differs from the module's.
    """
    for name, tensor in named_tensors(module):
        if name in values:
            if values[name].shape != tensor.shape:
                shape = tuple(values[name].shape)
                raise ProtocolError(f"{name!r} came as {shape}; the model's is {tuple(tensor.shape)}.")
            tensor.copy_(values[name])


def float_dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of floating-point inputs: that of the first floating-point parameter, float32 without one.

    Frozen parameters count: a frozen bfloat16 backbone under a float32 head is fed bfloat16.
    """
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes; nothing is copied."""
    return memoryview(tensor.detach().numpy()).cast("B")  # type: ignore[arg-type]  # numpy's stubs lack the buffer


def content_mark(tensors: Iterable[tuple[str, Tensor]]) -> tuple[Any, ...]:
    """What differs once an element of the tensors does, however it was written: sums over all of their memory, some 5 GB/s.

    No digest: contents that were made to have the same sums would be taken for the same.
    """
    marks: list[Any] = []
    for name, tensor in tensors:
        own = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous().reshape(-1)
        data = own.view(torch.uint8)
        data = data.clone() if data.storage_offset() % 8 else data
        words = data[: data.numel() // (8 * _ROW) * 8 * _ROW].view(torch.int64).view(-1, _ROW)
        rest = bytes(data[words.numel() * 8 :].numpy())
        sums = [side @ (2 * torch.arange(len(side)) + 1) for side in (words.sum(1), words.sum(0))]
        marks.append((name, str(tensor.dtype), tuple(tensor.shape), int(sums[0]), int(sums[1]), rest))
    return tuple(marks)


def unlike(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that only one side has, or that differ in shape or dtype."""
    return sorted(
        name
        for name in given.keys() | own.keys()
        if name not in given
        or name not in own
        or (given[name].shape, given[name].dtype) != (own[name].shape, own[name].dtype)
    )


def variances_of(module: nn.Module) -> dict[str, str]:
    """Names of running variances among the module's buffers -> the running mean they belong to."""
    variance_of: dict[str, str] = {}
    for name, child in module.named_modules():
        prefix = f"{name}." if name else ""
        if hasattr(child, "variance_of"):
            variance_of |= {f"{prefix}{var}": f"{prefix}{mean}" for var, mean in child.variance_of().items()}
        if isinstance(child, _NormBase) and child.running_var is not None:
            variance_of[f"{prefix}running_var"] = f"{prefix}running_mean"
    names = {name for name, _ in module.named_buffers()}
    return {var: mean for var, mean in variance_of.items() if var in names and mean in names}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a module's trainable parameters lie in one flat vector.

    The vector's dtype is float64 if any trainable parameter is, else float32, so every supported parameter
    (float16, bfloat16, float32, float64) is held exactly.
    """

    entries: tuple[Entry, ...]
    """Trainable parameters in `named_parameters()` order; frozen ones do not travel."""
    dtype: torch.dtype
    """torch.float32 or torch.float64."""
    buffers: tuple[str, ...]
    """Names of the buffers that there are at first."""

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """Read the layout off `module`.

        Raises:
            ConfigError: no trainable parameter, an uninitialized lazy one, or a dtype that cannot be averaged.
        """
        entries: list[Entry] = []
        offset = 0
        for name, parameter in module.named_parameters():
            if is_lazy(parameter):
                raise ConfigError(
                    f"parameter {name!r} is not initialized yet: run one batch through the lazy module first."
                )
            if not parameter.requires_grad:
                continue
            if not parameter.is_floating_point():
                raise ConfigError(
                    f"trainable parameter {name!r} has dtype {parameter.dtype}; only real floating-point parameters "
                    "can be averaged. Freeze it (requires_grad=False) or store real and imaginary parts apart."
                )
            entry = Entry(name=name, shape=tuple(parameter.shape), dtype=parameter.dtype, offset=offset)
            entries.append(entry)
            offset += entry.numel
        if not entries:
            raise ConfigError(
                f"model {type(module).__name__} has no trainable parameter; set requires_grad=True on what should learn."
            )
        wide = any(entry.dtype == torch.float64 for entry in entries)
        return cls(
            entries=tuple(entries),
            dtype=torch.float64 if wide else torch.float32,
            buffers=tuple(name for name, _ in module.named_buffers()),
        )

    @property
    def numel(self) -> int:
        """Length of the vector."""
        last = self.entries[-1]
        return last.offset + last.numel

    @property
    def num_bytes(self) -> int:
        """Size of the vector in bytes: the P of the cost model."""
        return self.numel * self.dtype.itemsize

    def empty(self, sections: int = 1) -> Tensor:
        """An uninitialized vector, shape (sections * numel,), on the CPU."""
        return torch.empty(sections * self.numel, dtype=self.dtype)

    def views(self, vector: Tensor) -> list[Tensor]:
        """The vector's parameters in their own shapes, sharing its memory."""
        return [vector[e.offset : e.offset + e.numel].view(e.shape) for e in self.entries]

    @torch.no_grad()
    def read(self, module: nn.Module, out: Tensor) -> Tensor:
        """Copy the module's trainable parameters into `out`, shape (numel,)."""
        parameters = dict(module.named_parameters())
        for entry, view in zip(self.entries, self.views(out), strict=True):
            view.copy_(parameters[entry.name])
        return out

    @torch.no_grad()
    def write(self, module: nn.Module, vector: Tensor) -> None:
        """Copy `vector`, shape (numel,), into the module's trainable parameters, rounding once to their dtype."""
        parameters = dict(module.named_parameters())
        for entry, view in zip(self.entries, self.views(vector), strict=True):
            parameters[entry.name].copy_(view)

    def to_json(self) -> dict[str, Any]:
        """Names, shapes and dtypes, for fingerprints and for a checkpoint's identity."""
        return {
            "dtype": str(self.dtype),
            "parameters": [[e.name, list(e.shape), str(e.dtype)] for e in self.entries],
            "buffers": list(self.buffers),
        }

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change whenever a name, shape, dtype or the order does."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
