"""Codecs of the parameter plane: how a vector's chunks become bytes, and back.

A lossy codec is given differences (trained minus start on the way up, new minus known on the way down), never parameters: what
it loses is then only a part of the change. The master copy on the driver stays in the layout's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, Protocol, final

import torch
import xxhash
from torch import Tensor

__all__ = [
    "CHECKSUM_BYTES",
    "CHUNK",
    "CODECS",
    "LARGEST",
    "Checksum",
    "Codec",
    "checksummed",
    "chunks_of",
    "codec_named",
    "encoded_bytes",
]

CHUNK: Final = 1 << 18
"""Elements that are encoded, sent, decoded and summed at a time; part of the format."""

LARGEST: Final = 3.38e38
"""Beyond this, rounding to bfloat16 makes an infinity."""

_BLOCK: Final = 256
_SCALE_BYTES: Final = 4


class Codec(Protocol):
    """One way to write a chunk of at most `CHUNK` elements as bytes."""

    name: str
    lossy: bool

    def num_bytes(self, numel: int, dtype: torch.dtype) -> int:
        """Length of the bytes of a chunk of `numel` elements of `dtype`."""

    def encode(self, values: Tensor) -> Tensor:
        """A chunk, (numel,), as (num_bytes,) uint8; may share its memory."""

    def decode(self, data: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """The (numel,) elements of (num_bytes,) uint8, in `dtype` or float32; may share its memory."""


@final
class Identity:
    """Every bit, as it is."""

    name = "identity"
    lossy = False

    def num_bytes(self, numel: int, dtype: torch.dtype) -> int:
        """The elements' own size."""
        return numel * dtype.itemsize

    def encode(self, values: Tensor) -> Tensor:
        """The same memory."""
        return values.view(torch.uint8)

    def decode(self, data: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """The same memory."""
        return data.view(dtype)[:numel]


@final
class BFloat16:
    """Rounded to the nearest bfloat16: 2 bytes an element, relative error at most 2^-9."""

    name = "bf16"
    lossy = True

    def num_bytes(self, numel: int, dtype: torch.dtype) -> int:
        """Two bytes an element."""
        del dtype
        return 2 * numel

    def encode(self, values: Tensor) -> Tensor:
        """Round."""
        return values.to(torch.bfloat16).view(torch.uint8)

    def decode(self, data: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """Widen."""
        del dtype
        return data.view(torch.bfloat16)[:numel].to(torch.float32)


@final
class Int8Block:
    """Blocks of 256 elements on a scale of their own: s = max|x| / 127, error at most s / 2 an element.

    A chunk is the blocks' scales (float32), then one signed byte an element; about 3.9 times smaller than float32.
    """

    name = "int8"
    lossy = True

    def num_bytes(self, numel: int, dtype: torch.dtype) -> int:
        """One byte an element and four a block."""
        del dtype
        return numel + _SCALE_BYTES * -(-numel // _BLOCK)

    def encode(self, values: Tensor) -> Tensor:
        """Scale and round every block."""
        numel = values.numel()
        blocks = -(-numel // _BLOCK)
        padded = values.to(torch.float32)
        if numel % _BLOCK:
            padded = torch.nn.functional.pad(padded, (0, blocks * _BLOCK - numel))
        rows = padded.view(blocks, _BLOCK)
        # A block of zeros, or of values next to zero, has the smallest scale that is a normal number.
        scales = rows.abs().amax(1).div_(127.0).clamp_(min=torch.finfo(torch.float32).tiny)  # (blocks,) float32
        steps = (rows / scales[:, None]).round_().clamp_(-127.0, 127.0).to(torch.int8)
        return torch.cat([scales.view(torch.uint8), steps.view(-1)[:numel].view(torch.uint8)])

    def decode(self, data: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """Multiply by the scales."""
        del dtype
        blocks = -(-numel // _BLOCK)
        # A view of float32 needs its memory aligned to four bytes, which a piece of a message need not be.
        scales = data[: _SCALE_BYTES * blocks].clone().view(torch.float32)
        steps = data[_SCALE_BYTES * blocks :][:numel].view(torch.int8).to(torch.float32)
        whole = numel // _BLOCK * _BLOCK
        steps[:whole].view(-1, _BLOCK).mul_(scales[: whole // _BLOCK, None])
        if whole < numel:
            steps[whole:].mul_(scales[-1])
        return steps


CODECS: Final[dict[str, Codec]] = {
    codec.name: codec
    for codec in (
        Identity(),
        BFloat16(),
        Int8Block(),
    )
}
"""Every codec by the name that `codec` and `down_codec` take."""


def codec_named(name: str) -> Codec:
    """The codec that a checked setting names."""
    return CODECS[name]


def chunks_of(numel: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of every chunk of a vector."""
    for start in range(0, numel, CHUNK):
        yield start, min(start + CHUNK, numel)


def encoded_bytes(codec: Codec, numel: int, dtype: torch.dtype) -> int:
    """Length of a whole vector's bytes: those of its chunks, one after the other."""
    full, rest = divmod(numel, CHUNK)
    return full * codec.num_bytes(CHUNK, dtype) + (codec.num_bytes(rest, dtype) if rest else 0)


CHECKSUM_BYTES: Final = 8

Checksum = xxhash.xxh3_64


def checksummed(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The pieces of a body, and their checksum after the last: each is hashed on its way out, while it is in cache."""
    checksum = Checksum()
    for piece in pieces:
        checksum.update(piece)
        yield piece
    yield checksum.digest()
