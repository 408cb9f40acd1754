"""Headers before bodies: an update is in a sum only after every header of its round was found good."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Final, final

from sparkdeep.averaging import OrderedSum
from sparkdeep.errors import NonFiniteError, ProtocolError
from sparkdeep.messages import Update
from sparkdeep.parameters import Layout

__all__ = ["Admission"]

MAX_SECTIONS: Final = 8


@final
class Admission:
    """Collects the headers of a round; every replica goes on when all are in and none is refused."""

    def __init__(self, count: int, layout: Layout, check: Callable[[], None], round_number: int) -> None:
        self._count = count
        self._layout = layout
        self._check = check
        self._round = round_number
        self._headers: dict[int, Update] = {}
        self._all_in = threading.Condition()
        self._total: OrderedSum | None = None
        self.sections: list[str] = []

    @property
    def updates(self) -> list[Update]:
        """The headers, in replica order."""
        return [self._headers[i] for i in range(self._count)]

    @property
    def total(self) -> OrderedSum:
        """The sum that admitted updates are added to."""
        assert self._total is not None
        return self._total

    def enter(self, replica: int, host: str, update: Update) -> OrderedSum:
        """Wait for the other headers, and give the sum to add to.

        Raises:
            NonFiniteError: the replica reports NaN or infinity; nothing was added.
            ProtocolError: the header does not belong to this round or makes no sense.
        """
        if update.round != self._round:
            raise ProtocolError(f"replica {replica} sent an update of round {update.round} in round {self._round}.")
        if not update.finite:
            raise NonFiniteError(
                f"round {self._round}: the loss or the parameters of replica {replica} on {host} became NaN or infinite; "
                "the mean was not touched. Lower the learning rate, set clip_grad_norm=, or check the data for values "
                "that overflow.",
                round_number=self._round,
                replica=replica,
            )
        if not 0 <= update.weight < math.inf or update.rows < 0 or len(update.sections) > MAX_SECTIONS:
            raise ProtocolError(f"replica {replica} sent an update of weight {update.weight}, rows {update.rows}.")
        with self._all_in:
            self._headers[replica] = update
            if len(self._headers) == self._count:
                self._make_sum()
                self._all_in.notify_all()
            while self._total is None:
                if not self._all_in.wait(timeout=0.25):
                    self._check()
            return self._total

    def _make_sum(self) -> None:
        counted = [u for u in self.updates if u.weight > 0]
        sections = {tuple(u.sections) for u in counted}
        if len(sections) > 1:
            raise ProtocolError(f"replicas average different optimizer states: {sorted(sections)}.")
        self.sections = list(sections.pop()) if sections else []
        size = (1 + len(self.sections)) * self._layout.numel
        self._total = OrderedSum(size, [u.weight for u in self.updates])
