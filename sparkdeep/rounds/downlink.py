"""What replicas are sent of the global parameters: all of them, or, with a lossy codec, changes of a copy."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from sparkdeep.errors import CheckpointError
from sparkdeep.tensors.encoding import Codec, chunks_of
from sparkdeep.tensors.parameters import raw_bytes

__all__ = ["Downlink"]


def _unlike(stored: Any, own: Tensor | None) -> bool:
    """Whether a stored copy does not fit, so that it cannot be taken over."""
    if own is None or stored is None:
        return stored is not own
    return not isinstance(stored, Tensor) or stored.shape != own.shape


@final
class Downlink:
    """The driver's knowledge of what replicas know.

    With a lossy codec, replicas hold a copy of the global parameters that differs from them by what the codec lost.
    After each outer step the difference is encoded, and both ends add what it decodes to. What one round loses, the
    next one makes up for, because the difference is to the copy. The copy is part of the run's state, so that a resumed
    run goes on exactly.

    Args:
        codec: for the changes.
        overlap: whether the copy of the previous round is needed too.
        parameters: the global parameters, (numel,), always the same memory.
    """

    def __init__(self, codec: Codec, *, overlap: bool, parameters: Tensor) -> None:
        self._codec = codec
        self._parameters = parameters.detach()
        self.current = self._parameters.clone() if codec.lossy else self._parameters
        """(numel,): what replicas start the next round from."""
        self.previous = self.current.clone() if overlap else None
        """(numel,): what they started the last round from, with `overlap`."""
        self.encoded: bytes | None = None
        """What leads from the previous copy to `current`; None at the start, and where all parameters travel."""

    def before_step(self) -> None:
        """Called when the round's updates are in: what replicas started it from becomes the previous copy."""
        if self.previous is not None:
            self.previous.copy_(self.current)

    def after_step(self) -> None:
        """Called when the global parameters have moved."""
        if not self._codec.lossy:
            return
        pieces = []
        for start, stop in chunks_of(self._parameters.numel()):
            known = self.current[start:stop]
            data = self._codec.encode(self._parameters[start:stop] - known)
            known.add_(self._codec.decode(data, stop - start, known.dtype))
            pieces.append(raw_bytes(data))
        self.encoded = b"".join(pieces)

    def state_dict(self) -> dict[str, Any]:
        """Both copies; None where the parameters themselves are known."""
        return {"current": self.current if self._codec.lossy else None, "previous": self.previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; the parameters were restored before.

        Raises:
            CheckpointError: it was written with other settings.
        """
        if any(_unlike(state.get(name), own) for name, own in self.state_dict().items()):
            raise CheckpointError("the run's state was kept with another down_codec= or overlap=.")
        with torch.no_grad():
            if self._codec.lossy:
                self.current.copy_(state["current"])
            if self.previous is not None:
                self.previous.copy_(state["previous"])
        self.encoded = None
