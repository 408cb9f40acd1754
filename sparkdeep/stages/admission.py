"""Headers before bodies: an update is in a sum only after the headers of its round were found good."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, final

from sparkdeep.protocol.messages import Update
from sparkdeep.protocol.refusals import check_update, not_finite

__all__ = ["Admission", "Terms", "Verdict"]


Verdict = Literal["counted", "late", "nonfinite", "rolled back"]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """When a round closes, and whom it counts."""

    quorum: int | None = None
    """So many updates are enough; None: all of them."""
    grace_s: float = 0.0
    """How long the others are waited for then."""
    on_nonfinite: Literal["error", "drop", "rollback"] = "error"
    """What becomes of a round in which a replica reports NaN or infinity."""

    @property
    def may_undo(self) -> bool:
        """Whether a replica must be able to go back to where it was before the round."""
        return self.quorum is not None or self.on_nonfinite != "error"


@final
class Admission:
    """Collects the headers of a round; every replica goes on when it closes.

    Args:
        count: of replicas.
        check: called while waiting; raises to give up.
        round_number: of the round.
        prepare: given the headers in replica order, those of replicas that do not count with weight 0, makes what the
            bodies are added to; called once.
        terms: when the round closes.
    """

    def __init__(
        self,
        count: int,
        check: Callable[[], None],
        round_number: int,
        prepare: Callable[[list[Update]], None],
        terms: Terms,
    ) -> None:
        self._count = count
        self._check = check
        self._round = round_number
        self._prepare = prepare
        self._terms = terms
        self._headers: dict[int, Update] = {}
        self._hosts: dict[int, str] = {}
        self._enough_at = math.inf
        self._news = threading.Condition()
        self.verdicts: dict[int, Verdict] = {}
        """Of every replica, once the round is closed."""
        self.rolled_back = False
        """Whether the round counts nobody, and all go back to where it began."""

    @property
    def updates(self) -> list[Update]:
        """The headers in replica order; of a replica that does not count, one that says so."""
        return self._listed(self.verdicts)

    def _listed(self, verdicts: Mapping[int, Verdict]) -> list[Update]:
        return [
            self._headers[i] if verdicts[i] == "counted" else Update.absent(self._round, self._headers.get(i))
            for i in range(self._count)
        ]

    @property
    def passed_over(self) -> dict[int, int]:
        """Steps that replicas which do not count had taken of rows that are not to be met again."""
        known = {i: self._headers[i] for i, verdict in self.verdicts.items() if verdict in {"nonfinite", "rolled back"}}
        return {i: update.steps for i, update in known.items()}

    def closed_without(self, replica: int) -> bool:
        """Whether the round has closed, and the replica is late."""
        return self.verdicts.get(replica) == "late"

    def enter(self, replica: int, host: str, update: Update) -> Verdict:
        """Wait until the round closes.

        Raises:
            NonFiniteError: a replica reports NaN or infinity, and the terms do not pass over it; nothing was added.
            ProtocolError: the header does not belong to this round or makes no sense.
        """
        check_update(replica, host, update, self._round, allow_nonfinite=self._terms.on_nonfinite != "error")
        with self._news:
            if not self.verdicts:
                self._headers[replica], self._hosts[replica] = update, host
                if self._terms.quorum is not None and self._good() >= self._terms.quorum:
                    self._enough_at = min(self._enough_at, time.monotonic())
            while not self.verdicts:
                if len(self._headers) == self._count or time.monotonic() >= self._enough_at + self._terms.grace_s:
                    self._close()
                    self._news.notify_all()
                elif not self._news.wait(timeout=0.02 if self._enough_at < math.inf else 0.25):
                    self._check()
            return self.verdicts[replica]

    def _good(self) -> int:
        """Updates that a quorum is made of: a replica that is out of rows answers at once, and must not shut others out."""
        return sum(update.finite and update.rows > 0 for update in self._headers.values())

    def _close(self) -> None:
        bad = [i for i, update in sorted(self._headers.items()) if not update.finite]
        verdicts: dict[int, Verdict] = dict.fromkeys(range(self._count), "late")
        verdicts |= dict.fromkeys(self._headers, "counted")
        if bad and self._terms.on_nonfinite == "rollback":
            verdicts |= dict.fromkeys((i for i in self._headers if i not in bad), "rolled back")
        verdicts |= dict.fromkeys(bad, "nonfinite")
        if (
            bad
            and self._terms.on_nonfinite == "drop"
            and not any(verdict == "counted" and self._headers[i].weight > 0 for i, verdict in verdicts.items())
        ):
            raise not_finite(
                bad[0], self._hosts[bad[0]], self._round, " No other replica is left that could be counted."
            )
        self._prepare(self._listed(verdicts))
        self.rolled_back = bool(bad) and self._terms.on_nonfinite == "rollback"
        self.verdicts = verdicts
