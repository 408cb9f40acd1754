"""Headers before bodies: an update is in a sum only after every header of its round was found good."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar, final

from sparkdeep.errors import NonFiniteError, ProtocolError
from sparkdeep.messages import Update

__all__ = ["Admission", "check_update", "common_sections"]

MAX_SECTIONS: Final = 8

_T = TypeVar("_T")


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
    negative = update.rows < 0 or (update.logged and not update.rows)  # what is logged is averaged over rows
    if not 0 <= update.weight < math.inf or negative or len(update.sections) > MAX_SECTIONS:
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
class Admission(Generic[_T]):
    """Collects the headers of a round; every replica goes on when all are in and none is refused.

    Args:
        count: of replicas.
        check: called while waiting; raises to give up.
        round_number: of the round.
        prepare: given all headers in replica order, makes what the bodies are added to; called once.
    """

    def __init__(
        self, count: int, check: Callable[[], None], round_number: int, prepare: Callable[[list[Update]], _T]
    ) -> None:
        self._count = count
        self._check = check
        self._round = round_number
        self._prepare = prepare
        self._headers: dict[int, Update] = {}
        self._all_in = threading.Condition()
        self._prepared: list[_T] = []

    @property
    def updates(self) -> list[Update]:
        """The headers, in replica order."""
        return [self._headers[i] for i in range(self._count)]

    @property
    def prepared(self) -> _T:
        """What `prepare` made."""
        return self._prepared[0]

    def enter(self, replica: int, host: str, update: Update) -> _T:
        """Wait for the other headers; returns what `prepare` made.

        Raises:
            NonFiniteError: the replica reports NaN or infinity; nothing was added.
            ProtocolError: the header does not belong to this round or makes no sense.
        """
        check_update(replica, host, update, self._round)
        with self._all_in:
            self._headers[replica] = update
            if len(self._headers) == self._count:
                self._prepared.append(self._prepare(self.updates))
                self._all_in.notify_all()
            while not self._prepared:
                if not self._all_in.wait(timeout=0.25):
                    self._check()
            return self._prepared[0]
