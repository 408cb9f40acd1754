"""Where a replica's round starts, and what it sends of it: its parameters, or what it changed, in which code."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from sparkdeep import seams
from sparkdeep.errors import CheckpointError
from sparkdeep.protocol.messages import Update
from sparkdeep.settings.run import LocalSettings
from sparkdeep.tensors.encoding import CHECKSUM_BYTES, LARGEST, checksummed, chunks_of, codec_named, encoded_bytes
from sparkdeep.tensors.parameters import Layout, raw_bytes

__all__ = ["LocalResult", "LocalUpdate"]


@final
class LocalUpdate:
    """The parameter vectors of one replica.

    As they are (no lossy codec, no overlap), a round starts from the global parameters and sends the trained ones. With a
    lossy codec it sends the difference, and keeps what the code lost for the next one (`error_feedback`; Seide et al., 2014;
    Karimireddy et al., 2019). With `overlap` a round starts before the newest global parameters are there: from those of
    a round ago and this replica's own progress since, which they do not contain yet (Shen et al., 2019, CoCoD-SGD); or, with
    `overlap_mix`, from a mixture of them and this replica's own parameters (Douillard et al., 2025, Streaming DiLoCo).

    Memory: one vector; one more for a lossy codec, one for error feedback, three for overlap.

    Args:
        layout: of the model.
        settings: the replica's.
        parameters: the model's trainable ones, in the layout's order.
    """

    def __init__(self, layout: Layout, settings: LocalSettings, parameters: list[Tensor]) -> None:
        self._layout = layout
        self._parameters = parameters
        self._views: dict[int, list[Tensor]] = {}
        self.codec = codec_named(settings.codec)
        self.down = codec_named(settings.down_codec)
        self.overlap = settings.overlap > 0
        self.fragments = settings.overlap_fragments
        self._mix = settings.overlap_mix
        self.differs = self.codec.lossy or self.overlap
        # Four roles in as few vectors as the settings need: without overlap, `known`, `arriving` and `_start` are the same
        # memory, and `_vector` is too unless differences travel.
        self.known = layout.empty()
        """(numel,): the newest global parameters that arrived; a round without overlap starts from them."""
        self.arriving = layout.empty() if self.overlap else self.known
        """(numel,): what the next global parameters are written into."""
        self._start = layout.empty() if self.overlap else self.known
        self._vector = layout.empty() if self.differs else self.known
        self._residual = torch.zeros_like(self.known) if self.codec.lossy and settings.error_feedback else None
        self._pending: Tensor | None = None

    def take(self, data: Tensor, start: int, stop: int) -> None:
        """Take elements start..stop of the next global parameters, as `down` encoded what changed, (bytes,) uint8."""
        changed = self.down.decode(data, stop - start, self._layout.dtype)
        torch.add(self.known[start:stop], changed, out=self.arriving[start:stop])

    def begin(self) -> None:
        """Give the model the parameters that the next round starts from."""
        self.write(self._starting())

    def _starting(self) -> Tensor:
        if not self.overlap:
            return self.known
        if self._pending is None:
            self._start.copy_(self.known)
        elif self._mix is None:
            torch.add(self.known, self._pending, out=self._start)
        else:
            # _start still holds the last round's start, so that start + progress are this replica's own parameters.
            self._start.add_(self._pending).lerp_(self.known, 1.0 - self._mix)
        return self._start

    def arrived(self) -> None:
        """The next global parameters are whole."""
        if self.overlap:
            self.known, self.arriving = self.arriving, self.known

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Copy a vector, (numel,), into the model, rounding once to its parameters' dtypes."""
        torch._foreach_copy_(self._parameters, self._views_of(vector))

    def _views_of(self, vector: Tensor) -> list[Tensor]:
        """The vector's parameters in their shapes; made once for each of the vectors that stay."""
        at = vector.data_ptr()
        if at not in self._views:
            views = self._layout.views(vector)
            if vector is not self.known and vector is not self.arriving and vector is not self._start:
                return views
            self._views[at] = views
        return self._views[at]

    @torch.no_grad()
    def end(self, sections: int = 0) -> Tensor:
        """Read the trained model; gives the vector to send, with room for `sections` of optimizer state after it."""
        vector = self._vector if not sections else self._layout.empty(1 + sections)
        own = vector[: self._layout.numel] if sections else vector
        torch._foreach_copy_(self._views_of(own), self._parameters)
        if self.differs:
            own.sub_(self._start)
            if self.overlap:
                self._pending = own
            if self._residual is not None:
                vector = own + self._residual if self.overlap else own.add_(self._residual)
        return vector

    def finite(self, vector: Tensor) -> bool:
        """Whether a vector can be sent: NaN and infinity must not reach the mean."""
        # A sum is finite unless an element is not, or it overflows; only then is every element looked at.
        total = float(vector.sum())
        if total - total == 0.0 and not self.codec.lossy:
            return True
        return bool(torch.isfinite(vector).all()) and (not self.codec.lossy or float(vector.abs().max()) < LARGEST)

    def num_bytes(self, vector: Tensor) -> int:
        """Length of `pieces` in bytes."""
        return encoded_bytes(self.codec, vector.numel(), vector.dtype)

    def pieces(self, vector: Tensor) -> Iterator[memoryview]:
        """The vector's chunks as bytes, encoded as they are asked for; error feedback is up to date after the last one."""
        for start, stop in chunks_of(vector.numel()):
            chunk = vector[start:stop]
            data = self.codec.encode(chunk)
            if self._residual is not None:
                torch.sub(chunk, self.codec.decode(data, stop - start, chunk.dtype), out=self._residual[start:stop])
            yield raw_bytes(data)

    def state_dict(self) -> dict[str, Any]:
        """What the next round depends on, beside the global parameters: tensors, or None."""
        start = self._start if self._mix is not None and self._pending is not None else None
        return {"residual": self._residual, "pending": self._pending, "start": start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            CheckpointError: it is of other settings.
        """
        if (state["residual"] is None) != (self._residual is None):
            raise CheckpointError("the replica's state was kept with another codec= or error_feedback=.")
        if self._residual is not None:
            self._residual.copy_(state["residual"])
        self._pending = None
        if state["pending"] is not None:
            self._pending = self._vector.copy_(state["pending"])
        if state["start"] is not None:
            self._start.copy_(state["start"])

    def restart(self) -> None:
        """Forget what was lost in encoding, and what is under way."""
        self._pending = None
        if self._residual is not None:
            self._residual.zero_()


@dataclass(frozen=True, kw_only=True)
class LocalResult:
    """What a round's local work gives: the header, and the body in two parts."""

    update: Update
    vector: Tensor
    """(sections * numel,) in the layout's dtype: parameters, then optimizer state sections; empty at weight 0."""
    buffers: bytes
    """safetensors."""
    exchange: LocalUpdate
    """Writes the vector as bytes."""
    replica: int = 0
    """Whose it is."""
    ready: tuple[bytes, ...] | None = None
    """The vector's bytes, if they were made already."""

    @classmethod
    def nothing(cls, update: Update, exchange: LocalUpdate, replica: int) -> LocalResult:
        """Of a replica that does not count: a header, and no body."""
        assert update.weight == 0, "what counts has a body"
        return cls(update=update, vector=torch.empty(0), buffers=b"", exchange=exchange, replica=replica)

    def encoded(self) -> LocalResult:
        """The same, its vector encoded now if the code loses something: what is lost belongs to the replica's state."""
        if not self.exchange.codec.lossy or self.update.weight == 0:
            return self
        return replace(self, ready=tuple(bytes(piece) for piece in self.exchange.pieces(self.vector)))

    def body_bytes(self, *, vector: bool = True) -> int:
        """Length of `body`."""
        size = self.exchange.num_bytes(self.vector) if vector and self.update.weight > 0 else 0
        return size + len(self.buffers) + CHECKSUM_BYTES if size or not vector else 0

    def body(self, *, vector: bool = True) -> Iterator[seams.Buffer]:
        """The pieces of the body: the vector as it is encoded, buffers, checksum."""
        if self.update.weight == 0 and vector:
            return iter(())
        pieces = self.ready if self.ready is not None else self.exchange.pieces(self.vector)
        whole = checksummed(itertools.chain(pieces if vector else (), [self.buffers]))
        return seams.through("transfer", whole, round_number=self.update.round, replica=self.replica)
