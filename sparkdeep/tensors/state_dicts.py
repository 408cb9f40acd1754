"""State dicts as safetensors bytes and back: nested dicts, lists and numbers as JSON, tensors beside them; no pickle."""

from __future__ import annotations

import json
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sparkdeep.errors import CheckpointError

__all__ = ["pack", "pack_tensors", "unpack", "unpack_dict", "unpack_tensors"]

_TREE: Final = "__tree__"


def pack(tree: Any) -> bytes:
    """Serialize a tree of dicts, lists, tuples, numbers, strings, None and tensors.

    Raises:
        TypeError: a value of another type, named by its path.
    """
    tensors: dict[str, Tensor] = {}
    outline = _outline(tree, tensors, "state")
    text = json.dumps(outline).encode()
    tensors[_TREE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return pack_tensors(tensors)


def unpack(data: bytes) -> Any:
    """Give back what `pack` was given; tensors on the CPU.

    Raises:
        CheckpointError: the bytes are damaged or were not written by `pack`.
    """
    try:
        tensors = _loaded(data)
        outline = json.loads(tensors[_TREE].numpy().tobytes())
        return _restore(outline, tensors)
    except (SafetensorError, KeyError, ValueError, TypeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"damaged state of {len(data)} bytes: {type(error).__name__}: {error}") from error


def unpack_dict(data: bytes) -> dict[str, Any]:
    """Like `unpack`, for a packed dict whose keys are names.

    Raises:
        CheckpointError: as for `unpack`, or something else was packed.
    """
    tree = unpack(data)
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise CheckpointError(f"a state of {len(data)} bytes is a {type(tree).__name__}; named values were expected.")
    return tree


def pack_tensors(tensors: dict[str, Tensor]) -> bytes:
    """Named tensors as safetensors bytes; shared memory is written once for each name."""
    return bytes(save(dict(_stored(name, tensor) for name, tensor in tensors.items())))


def unpack_tensors(data: bytes) -> dict[str, Tensor]:
    """Named tensors from safetensors bytes, on the CPU.

    Raises:
        CheckpointError: the bytes are damaged.
    """
    try:
        return _loaded(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"damaged tensors of {len(data)} bytes: {error}") from error


_COMPLEX: Final = "\0complex128"
"""Ends the name of a complex128 tensor, which safetensors does not know, and which is stored as pairs of float64."""


def _stored(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    # A 0-d or non-contiguous tensor, or one that shares memory with another, is written as its own copy.
    own = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous().clone()
    return (name + _COMPLEX, torch.view_as_real(own)) if own.dtype == torch.complex128 else (name, own)


def _loaded(data: bytes) -> dict[str, Tensor]:
    tensors = load(data)
    return {
        name.removesuffix(_COMPLEX): torch.view_as_complex(tensor) if name.endswith(_COMPLEX) else tensor
        for name, tensor in tensors.items()
    }


def _outline(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value
        return {"t": name}
    if isinstance(value, dict):
        return {"d": [[_key(k, path), _outline(v, tensors, f"{path}[{k!r}]")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "l" if isinstance(value, list) else "u"
        return {kind: [_outline(v, tensors, f"{path}[{i}]") for i, v in enumerate(value)]}
    if isinstance(value, set | frozenset):
        return {"s": [_outline(v, tensors, f"{path}[{i}]") for i, v in enumerate(sorted(value))]}
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    raise TypeError(
        f"{path} is a {type(value).__name__}; only tensors, numbers, strings, None, lists, tuples and dicts can be "
        "kept without pickle. Give the optimizer or scheduler a state_dict of these."
    )


def _key(key: Any, path: str) -> Any:
    if isinstance(key, str | int):
        return key
    raise TypeError(f"{path} has a key of type {type(key).__name__}; keys must be strings or integers.")


def _restore(outline: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(outline, dict):
        return outline
    ((kind, value),) = outline.items()
    if kind == "t":
        return tensors[value]
    if kind == "d":
        return {k: _restore(v, tensors) for k, v in value}
    if kind in {"l", "u", "s"}:
        items = [_restore(v, tensors) for v in value]
        return items if kind == "l" else tuple(items) if kind == "u" else set(items)
    raise ValueError(f"unknown node {kind!r}")
