"""The mean of a round: shares by its headers, then one body after the other added, as they arrive or from memory."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, final

import torch
from torch import Tensor

from sparkdeep.optim.aggregators import Aggregator, aggregator_of
from sparkdeep.protocol.messages import Update
from sparkdeep.protocol.orders import Globals
from sparkdeep.protocol.refusals import Body, check_size, common_sections
from sparkdeep.tensors.encoding import CHECKSUM_BYTES, CHUNK, Codec, encoded_bytes
from sparkdeep.tensors.mean import Combining, OrderedSum, reduced_weights
from sparkdeep.tensors.parameters import Layout
from sparkdeep.tensors.pooling import Pooling

__all__ = ["Averaging", "Shares", "shares_of"]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """A round's new parameters are `sum_i weights[i] * x_i / divisor + rest * start`, with `start` what it began with."""

    weights: tuple[float, ...]
    divisor: float
    rest: float = 0.0
    """0 for a mean."""


def shares_of(updates: Sequence[Update], rows: Sequence[int], weighting: Literal["rows", "equal", "fednova"]) -> Shares:
    """The shares of a round's updates, in replica order.

    Args:
        updates: the headers; one of weight 0 does not count.
        rows: training rows of each replica's shard.
        weighting: "rows": by the rows, or their weights, that were trained on. "equal": all that trained alike. "fednova": Wang et al. (2020, "Tackling the
            objective inconsistency problem in heterogeneous federated optimization"): with `p_i` the replica's part of the
            rows that there are, and `t_i` its steps, the parameters move by
            `(sum_j p_j t_j) * sum_i p_i (x_i - start) / t_i`, so that a replica which takes more steps does not pull the
            optimum its way. With equal steps it is the mean by the rows that there are. Exact for plain SGD; a close correction for others.
    """
    weights = reduced_weights([update.weight for update in updates])
    counted = [i for i, weight in enumerate(weights) if weight > 0]
    if weighting == "equal":
        return Shares(weights=tuple(float(weight > 0) for weight in weights), divisor=float(len(counted)))
    if weighting == "rows" or not counted:
        return Shares(weights=tuple(weights), divisor=sum(weights))
    # Weighted rows weigh in a shard as they did in the part of it that was trained on.
    parts = {i: rows[i] * updates[i].weight / updates[i].rows for i in counted}
    if len({updates[i].steps for i in counted}) == 1:
        alike = reduced_weights([parts.get(i, 0.0) for i in range(len(updates))])
        return Shares(weights=tuple(alike), divisor=sum(alike))
    whole = sum(parts.values())
    effective = sum(parts[i] / whole * updates[i].steps for i in counted)
    shares = [parts[i] / whole * effective / updates[i].steps if i in parts else 0.0 for i in range(len(updates))]
    return Shares(weights=tuple(shares), divisor=1.0, rest=1.0 - sum(shares))


@final
@dataclass(frozen=True, kw_only=True)
class Averaging:
    """How a run's updates become one; the same for all its rounds."""

    layout: Layout
    codec: Codec
    """Of updates."""
    wide: bool
    """Whether the outer step wants the mean in float64, or rounded once to the layout's dtype."""
    weighting: Literal["rows", "equal", "fednova"] = "rows"
    """How much each replica counts."""
    aggregator: Aggregator | Literal["mean"] = "mean"
    """How their updates become one."""
    pooling: Pooling = field(default_factory=Pooling)
    """How their state beside the parameters becomes one."""
    embeddings: frozenset[str] = frozenset()
    """Names of the embeddings' parameters."""
    _kept: dict[object, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def kept(self, use: object, numel: int, dtype: torch.dtype) -> Tensor:
        """(numel,) for a use of its own; the same memory every round, as fresh pages are dear."""
        found = self._kept.get(use)
        if found is None or found.numel() != numel or found.dtype != dtype:
            found = self._kept[use] = torch.empty(numel, dtype=dtype)
        return found

    def total(self, updates: Sequence[Update], start: Globals, rows: Sequence[int], num_sections: int) -> Combining:
        """What bodies are added to as they arrive; its memory is the next round's too.

        Args:
            updates: the headers, which were found good, in replica order; of one that does not count, with weight 0.
            start: what the round started from.
            rows: training rows of every replica's shard.
            num_sections: optimizer states that follow the parameters.
        """
        dtype = torch.float64 if self.wide else self.layout.dtype
        out = self.kept("mean", (1 + num_sections) * self.layout.numel, dtype)
        shares = shares_of(updates, rows, self.weighting)
        return aggregator_of(self.aggregator).taking(self, shares, start, out)

    def vector_bytes(self, update: Update) -> int:
        """Length of the vector in an update's body, averaged optimizer state included."""
        return encoded_bytes(self.codec, (1 + len(update.sections)) * self.layout.numel, self.layout.dtype)

    def body_bytes(self, update: Update) -> int:
        """Length of an update's body."""
        return self.vector_bytes(update) + update.buffer_bytes + CHECKSUM_BYTES

    def pool(
        self, updates: Sequence[Update], received: Sequence[Mapping[str, Tensor]], start: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The state of the replicas that count as one, by the weights that their parameters have.

        Args:
            updates: the headers, in replica order.
            received: their state; of one that does not count, anything.
            start: what the round started from.
        """
        weights = [update.weight for update in updates]
        if self.weighting == "equal":
            weights = [float(weight > 0) for weight in weights]
        aggregator = aggregator_of(self.aggregator)
        return replace(self.pooling, elementwise=aggregator.elementwise).pool(received, weights, start)

    def add(self, total: Combining, update: Update, body: Body, wait: Callable[[], None]) -> dict[str, Tensor]:
        """Add a body to the total chunk by chunk, as it comes in; returns its buffers.

        Args:
            total: of the round.
            update: the body's header, which counts.
            body: of the size that its header says.
            wait: called while other replicas have their turn; raises to give up.

        Raises:
            ReplicaLostError: the body was damaged on its way; the round is void.
        """
        codec, dtype = self.codec, self.layout.dtype
        assert total.chunk == CHUNK, "chunks are encoded as they are summed"

        def chunks(start: int, stop: int) -> Tensor:
            return codec.decode(body.chunk(codec.num_bytes(stop - start, dtype)), stop - start, dtype)

        total.add(body.replica, chunks, wait)
        return body.buffers(update.buffer_bytes)

    def mean(
        self,
        updates: Sequence[Update],
        bodies: Callable[[int], bytes],
        base: Tensor | None,
        buffers: Mapping[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of updates that are all here, by the rows that they were trained on, in float64; and their pooled buffers.

        Args:
            updates: the headers, which were found good, in replica order; one of them counts.
            bodies: gives a replica's body; asked for each one that counts, in order.
            base: what the mean is added to where they are differences, (numel,); else None.
            buffers: the state that the round started from.

        Raises:
            ReplicaLostError: a body was damaged on its way.
            ProtocolError: replicas do not average the same optimizer state, or a body has the wrong size.
        """
        numel = (1 + len(common_sections(updates))) * self.layout.numel
        weights = [update.weight for update in updates]
        total = OrderedSum(numel, weights, base=base, chunk=CHUNK)
        received: list[dict[str, Tensor]] = [{} for _ in updates]
        for replica, update in enumerate(updates):
            if update.weight > 0:
                data = bodies(replica)
                check_size(replica, len(data), update, self.vector_bytes(update), buffer_limit_bytes=len(data))
                body = Body(io.BytesIO(data).readinto, who=f"replica {replica}", replica=replica)
                received[replica] = self.add(total, update, body, _never_waits)
        return total.mean(), self.pool(updates, received, buffers)


def _never_waits() -> None:
    raise AssertionError("updates are added one after the other")
