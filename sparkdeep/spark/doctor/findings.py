"""What a look at a session found, and what to change: findings, and the report that prints them."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass
from typing import Final, Literal, final

__all__ = ["Finding", "Level", "Report"]

Level = Literal["ok", "warn", "fail", "unknown"]

_WIDTH: Final = 118
_SIGNS: Final[dict[Level, str]] = {"ok": "ok", "warn": "WARN", "fail": "FAIL", "unknown": "?"}
_WORDS: Final[dict[Level, str]] = {"ok": "ok", "warn": "to look at", "fail": "failed", "unknown": "unknown"}


@final
@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    """What was looked at, such as "barrier stages" or "local directories"."""
    level: Level
    """"ok"; "warn" (training runs, but worse or at risk); "fail" (it does not run); "unknown" (it could not be seen)."""
    seen: str
    """What was seen, with its numbers."""
    change: str = ""
    """What to change, word for word; "" where nothing is to be changed."""

    def __str__(self) -> str:
        lines = _wrapped(f"{_SIGNS[self.level]:<5} {self.name}: ", self.seen)
        return "\n".join([*lines, *(_wrapped("      change: ", self.change) if self.change else [])])


@final
@dataclass(frozen=True, kw_only=True)
class Report:
    """What `sparkdeep.doctor` found; print it."""

    session: str
    """Which session was looked at."""
    findings: tuple[Finding, ...]
    """In the order in which they were looked at."""
    seconds: float
    """How long it took."""

    @property
    def ok(self) -> bool:
        """Whether nothing fails; there may be warnings."""
        return not self.of("fail")

    def of(self, *levels: Level) -> list[Finding]:
        """The findings of these levels."""
        return [finding for finding in self.findings if finding.level in levels]

    def __str__(self) -> str:
        counts = Counter(finding.level for finding in self.findings)
        verdict = "sparkdeep can train here" if self.ok else "sparkdeep cannot train here"
        numbers = ", ".join(f"{counts[level]} {word}" for level, word in _WORDS.items() if counts[level])
        head = f"sparkdeep doctor: {self.session}"
        return "\n".join([head, *map(str, self.findings), f"{verdict}: {numbers}; looked for {self.seconds:.1f} s."])


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * 6,
        break_long_words=False,
        break_on_hyphens=False,
    )
