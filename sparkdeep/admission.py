"""Headers before bodies: an update is in a sum only after every header of its round was found good."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Final, final

from sparkdeep.averaging import OrderedSum
from sparkdeep.errors import NonFiniteError, ProtocolError
from sparkdeep.messages import Update
from sparkdeep.parameters import Layout

__all__ = ["Admission", "check_update", "common_sections"]

MAX_SECTIONS: Final = 8


def check_update(replica: int, host: str, update: Update, round_number: int) -> None:
    """Refuse a header that must not be counted.

    Raises:
        NonFiniteError: the replica reports NaN or infinity; nothing was added.
        ProtocolError: the header does not belong to this round or makes no sense.
    """
    if update.round != round_number:
        raise ProtocolError(f"replica {replica} sent an update of round {update.round} in round {round_number}.")
    if not update.finite:
        raise NonFiniteError(
            f"round {round_number}: the loss or the parameters of replica {replica} on {host} became NaN or infinite; "
            "the mean was not touched. Lower the learning rate, set clip_grad_norm=, or check the data for values "
            "that overflow.",
            round_number=round_number,
            replica=replica,
        )
    if not 0 <= update.weight < math.inf or update.rows < 0 or len(update.sections) > MAX_SECTIONS:
        raise ProtocolError(f"replica {replica} sent an update of weight {update.weight}, rows {update.rows}.")


def common_sections(updates: Sequence[Update]) -> list[str]:
    """Names of the optimizer state that the replicas which count average.

    Raises:
        ProtocolError: they do not agree.
    """
    sections = {tuple(update.sections) for update in updates if update.weight > 0}
    if len(sections) > 1:
        raise ProtocolError(f"replicas average different optimizer states: {sorted(sections)}.")
    return list(sections.pop()) if sections else []


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
        check_update(replica, host, update, self._round)
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
        self.sections = common_sections(self.updates)
        size = (1 + len(self.sections)) * self._layout.numel
        self._total = OrderedSum(size, [u.weight for u in self.updates])
