"""Replicas that add their updates up among themselves: each sums one part of the vector, in the order of the star.

Parts travel from replica to replica through a `torch.distributed` process group of the stage (gloo on the CPU, NCCL where
replicas compute on GPUs). The exchange is an all-to-all of parts, which moves as many bytes as a reduce-scatter and leaves
the sum to us: float64, in replica order, divided once, so that plain averaging gives the bits of the star.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from sparkdeep.errors import ReplicaLostError
from sparkdeep.replica.link import ReplicaLink
from sparkdeep.tensors.mean import Partition, weighted_mean

__all__ = ["Ring"]


if dist.is_available():

    class _Store(dist.Store):  # type: ignore[name-defined]  # torch has no stub of it
        """Where replicas meet, as a process group wants it: nothing listens, and every call goes through the coordinator."""

        def __init__(self, link: ReplicaLink) -> None:
            super().__init__()
            self._link = link

        def set(self, key: str, value: Any) -> None:
            self._link.put(key, value.encode("latin-1") if isinstance(value, str) else bytes(value))

        def get(self, key: str) -> bytes:
            return self._link.get(key)

        def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
            del timeout  # the link has its own
            for key in keys:
                self._link.get(key)


@final
class Ring:
    """One replica's place among the replicas of a stage.

    Args:
        link: by which the replicas of the stage meet.
        rank, size: this replica, and how many there are.
        host: this replica's address, as the others reach it.
        device: where it computes.
        timeout_s: of every collective: a replica that is lost must not hold up the others for ever.

    Raises:
        ReplicaLostError: the group could not be made, or, later, a collective failed; the process is not used again.
    """

    def __init__(
        self, link: ReplicaLink, rank: int, size: int, *, host: str, device: torch.device, timeout_s: float
    ) -> None:
        self._rank = rank
        self.size = size
        self._timeout = timedelta(seconds=timeout_s)
        self._device = device if device.type == "cuda" else torch.device("cpu")
        self._scratch: dict[str, Tensor] = {}
        try:
            self._group = self._make(_Store(link), host)
            # The first collective of a group meets through the store too, which is only there while the stage opens.
            self._exchange(torch.zeros(size, device=self._device), torch.empty(size, device=self._device))
        except RuntimeError as error:
            raise self._lost("make its connections", error) from error

    def _make(self, store: Any, host: str) -> Any:
        backends: Any = dist
        if self._device.type == "cuda":
            options = backends.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            return backends.ProcessGroupNCCL(store, self._rank, self.size, options)
        gloo = backends.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = self._timeout
        return gloo(store, self._rank, self.size, options)

    def bounds(self, numel: int) -> tuple[int, int]:
        """[start, stop) of this replica's part of a vector of `numel` elements."""
        return Partition(numel, self.size).bounds(self._rank)

    def reduce(self, vector: Tensor, numel: int, weights: Sequence[float]) -> Tensor:
        """Add all replicas' vectors up; gives this replica's part of the mean, rounded once to the vector's dtype.

        Args:
            vector: (numel,) on the CPU; of a replica of weight 0 it is empty.
            numel: of the others' vectors.
            weights: one a replica, not all 0.
        """
        size = Partition(numel, self.size).size
        mine = self._room("send", size * self.size, vector.dtype)
        mine[: vector.numel()] = vector
        theirs = self._room("receive", size * self.size, vector.dtype)
        self._collect(mine, theirs, "add up its updates")
        start, stop = self.bounds(numel)
        rows = list(theirs.view(self.size, size)[:, : stop - start])
        return weighted_mean(rows, weights, self._room("part", stop - start, vector.dtype))

    def gather(self, part: Tensor, into: Tensor) -> None:
        """Fill `into`, (numel,), with every replica's part of it; `part` is this replica's own, and may lie inside."""
        size = Partition(into.numel(), self.size).size
        mine = self._room("send", size * self.size, into.dtype)
        mine.view(self.size, size)[:, : part.numel()] = part
        theirs = self._room("receive", size * self.size, into.dtype)
        self._collect(mine, theirs, "hand on the new parameters")
        into.copy_(theirs[: into.numel()])

    def close(self) -> None:
        """Let go of the connections."""
        self._scratch.clear()
        self._group = None

    def _room(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """A vector that is used again every round."""
        found = self._scratch.get(name)
        if found is None or found.numel() != numel or found.dtype != dtype:
            found = self._scratch[name] = torch.zeros(numel, dtype=dtype)
        return found

    def _collect(self, mine: Tensor, theirs: Tensor, what: str) -> None:
        try:
            if self._device.type == "cpu":
                self._exchange(mine, theirs)
                return
            received = torch.empty_like(theirs, device=self._device)
            self._exchange(mine.to(self._device), received)
            theirs.copy_(received)
        except RuntimeError as error:
            raise self._lost(what, error) from error

    def _exchange(self, mine: Tensor, theirs: Tensor) -> None:
        """All-to-all: the i-th part of `mine` goes to replica i, whose own part for this replica is the i-th of `theirs`."""
        self._group.alltoall_base(theirs, mine, [], []).wait(self._timeout)

    def _lost(self, what: str, error: RuntimeError) -> ReplicaLostError:
        return ReplicaLostError(
            f"the ring of {self.size} replicas could not {what} within {self._timeout.total_seconds():g} s: {error}. Either a "
            "replica was lost, or executors cannot reach each other: aggregation='star' needs the driver's port only.",
            replica=self._rank,
        )
