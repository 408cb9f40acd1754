"""The mean of a round from whole updates, one after the other: the same sums, in the same order, as on the wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparkdeep.errors import ProtocolError, ReplicaLostError
from sparkdeep.protocol.messages import Update
from sparkdeep.protocol.refusals import check_update, common_sections
from sparkdeep.tensors.encoding import CHECKSUM_BYTES, CHUNK, Checksum, Codec, encoded_bytes
from sparkdeep.tensors.mean import OrderedSum, pool_buffers
from sparkdeep.tensors.parameters import Layout
from sparkdeep.tensors.state_dicts import unpack_tensors

__all__ = ["Mean", "check_updates", "combine"]


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The weighted mean of a round's updates."""

    vector: Tensor
    """((1 + len(sections)) * numel,) float64: parameters, then averaged optimizer state."""
    buffers: dict[str, Tensor]
    sections: list[str]


def check_updates(updates: Sequence[Update], hosts: Sequence[str], round_number: int) -> None:
    """Refuse a round of which one header is not good.

    Raises:
        NonFiniteError, ProtocolError: see `refusals.check_update`.
    """
    for replica, (update, host) in enumerate(zip(updates, hosts, strict=True)):
        check_update(replica, host, update, round_number)


def combine(
    updates: Sequence[Update], body_of: Callable[[int], bytes], layout: Layout, codec: Codec, base: Tensor | None
) -> Mean | None:
    """Average updates whose headers were checked.

    Args:
        updates: the headers, in replica order.
        body_of: gives a replica's body, vector, buffers and checksum; called once for each replica that counts, in order.
        layout: of the model.
        codec: of the vectors.
        base: what the mean is added to where they are differences, (numel,); else None.

    Returns:
        The mean, or None when every replica is out of rows.

    Raises:
        ReplicaLostError: a body was damaged on its way.
        ProtocolError: replicas do not average the same optimizer state, or a body has the wrong size.
    """
    weights = [update.weight for update in updates]
    if not any(weights):
        return None
    sections = common_sections(updates)
    size = (1 + len(sections)) * layout.numel
    vector_bytes = encoded_bytes(codec, size, layout.dtype)
    total = OrderedSum(size, weights, base=base)
    buffers: list[dict[str, Tensor]] = []
    for replica, update in enumerate(updates):
        if update.weight == 0:
            buffers.append({})
            continue
        body = body_of(replica)
        end = vector_bytes + update.buffer_bytes
        if len(body) != end + CHECKSUM_BYTES:
            raise ProtocolError(
                f"replica {replica} sent {len(body)} bytes; {vector_bytes} of parameters and {update.buffer_bytes} of "
                "buffers and a checksum were announced."
            )
        if Checksum(memoryview(body)[:end]).digest() != body[end:]:
            raise ReplicaLostError(
                f"the update of replica {replica} was damaged on its way (checksum differs); the round is void.",
                replica=replica,
            )
        data = torch.frombuffer(bytearray(body[:vector_bytes]), dtype=torch.uint8)
        total.add(replica, _chunks(data, codec, layout.dtype), _never_waits)
        buffers.append(unpack_tensors(body[vector_bytes:end]))
    return Mean(
        vector=total.mean(),
        buffers=pool_buffers(_filled(buffers), weights, layout.variance_of),
        sections=sections,
    )


def _chunks(data: Tensor, codec: Codec, dtype: torch.dtype) -> Callable[[int, int], Tensor]:
    full = codec.num_bytes(CHUNK, dtype)

    def chunk(start: int, stop: int) -> Tensor:
        at = start // CHUNK * full
        return codec.decode(data[at : at + codec.num_bytes(stop - start, dtype)], stop - start, dtype)

    return chunk


def _never_waits() -> None:
    raise AssertionError("updates are added one after the other")


def _filled(buffers: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Replicas of weight 0 are ignored by `pool_buffers`; they get any values."""
    some = next(values for values in buffers if values) if any(buffers) else {}
    return [values or some for values in buffers]
