"""Steps of a pipeline, each runnable alone: what is done is not done again, what is missing is named."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, final

from sparkdeep.errors import ConfigError, DataError
from sparkdeep.storage.store import Store

__all__ = ["Step", "StepReport", "Steps"]

_MAX_MARKER_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: what it needs, what it does, and which settings its result depends on."""

    name: str
    work: Callable[[], Mapping[str, Any]]
    """Does the step and returns what the marker keeps of it (JSON); whatever it writes may be there in part already."""
    needs: tuple[str, ...] = ()
    """Names of the steps before it."""
    settings: Any = None
    """JSON: a step whose settings changed is done again."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """How one step went."""

    name: str
    done_before: bool
    """An earlier run had done it with the same settings and inputs."""
    seconds: float
    result: Mapping[str, Any]


@final
class Steps:
    """The steps of one pipeline and the folder where their markers lie.

    A step is done when its marker is there, written after everything else, and carries the fingerprint of today's
    settings and of the steps before it. So a rerun after a failure continues where the last run broke off, and a changed
    setting repeats the steps that depend on it and no others.

    Args:
        steps: in an order in which every step comes after those it needs.
        store: the folder; markers are steps/NAME.json.
    """

    def __init__(self, steps: Sequence[Step], store: Store) -> None:
        self._steps: dict[str, Step] = {}
        for step in steps:
            missing = [name for name in step.needs if name not in self._steps]
            assert not missing, f"{step.name} needs {missing}, which do not come before it"
            self._steps[step.name] = step
        self._store = store

    @property
    def names(self) -> list[str]:
        """All steps in order."""
        return list(self._steps)

    def needs(self, name: str) -> tuple[str, ...]:
        """The steps that a step needs."""
        return self._steps[name].needs

    def fingerprint(self, name: str) -> str:
        """16 hexadecimal digits over the step's settings and those of every step before it."""
        step = self._steps[name]
        parts = [name, step.settings, [self.fingerprint(need) for need in step.needs]]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def result(self, name: str) -> Mapping[str, Any] | None:
        """What a finished step left in its marker; None if it is not done, or was done with other settings."""
        marker = self._marker(name)
        if marker is None or marker.get("fingerprint") != self.fingerprint(name):
            return None
        result: Mapping[str, Any] = marker["result"]
        return result

    def run(self, name: str, *, again: bool = False) -> StepReport:
        """Do one step, unless it is done.

        Args:
            name: of the step.
            again: do it even so.

        Raises:
            ConfigError: a step that it needs is not done, or was done with other settings: nothing is run.
        """
        step = self._steps[name]
        for need in step.needs:
            if self.result(need) is None:
                why = "has not been done" if self._marker(need) is None else "was done with other settings or inputs"
                raise ConfigError(
                    f"step {name!r} needs step {need!r}, which {why} in {self._store.uri}: run --step {need} first, or all "
                    "steps without --step."
                )
        done = self.result(name)
        if done is not None and not again:
            return StepReport(name=name, done_before=True, seconds=0.0, result=done)
        began = time.monotonic()
        # Without its marker a step that breaks off is not taken for done, and neither is any that depends on it.
        self._store.delete(self._path(name))
        result = dict(step.work())
        marker = {
            "step": name,
            "fingerprint": self.fingerprint(name),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "result": result,
        }
        self._store.write(self._path(name), json.dumps(marker, indent=1).encode())
        return StepReport(name=name, done_before=False, seconds=time.monotonic() - began, result=result)

    def _path(self, name: str) -> str:
        return f"steps/{name}.json"

    def _marker(self, name: str) -> dict[str, Any] | None:
        try:
            data = self._store.read(self._path(name), max_bytes=_MAX_MARKER_BYTES)
        except FileNotFoundError:
            return None
        try:
            marker = json.loads(data)
        except ValueError:
            marker = None
        if not isinstance(marker, dict) or not isinstance(marker.get("result"), dict):
            raise DataError(
                f"the marker {self._path(name)} in {self._store.uri} is no JSON object with a result: remove it, and run the "
                "step again."
            )
        return marker
