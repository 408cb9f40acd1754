"""Snapshots of a run, from which lost rounds are made up: in memory, or as checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, final

from sparkdeep.storage.checkpoints import CheckpointDirectory, Loaded

__all__ = ["CheckpointSnapshots", "MemorySnapshots", "Snapshot", "Snapshots"]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A durable state: what `RunState.to_files` gave after a round."""

    round: int
    files: Mapping[str, bytes]

    def replica(self, number: int) -> bytes | None:
        """A replica's state, or None when none is in the snapshot (round 0)."""
        name = f"replica-{number:05d}.safetensors"
        return self.files[name] if name in self.files else None  # noqa: SIM401 (files may be read lazily)


class Snapshots(Protocol):
    """Where durable states are kept."""

    def save(self, snapshot: Snapshot) -> None:
        """Keep `snapshot`, durably on return."""

    def latest(self) -> Snapshot | None:
        """The newest one, or None."""


@final
class MemorySnapshots:
    """Keeps the newest snapshot in the driver's memory: as durable as the driver."""

    def __init__(self) -> None:
        self._latest: Snapshot | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Replace the previous one."""
        self._latest = snapshot

    def latest(self) -> Snapshot | None:
        """The newest one."""
        return self._latest


@final
class CheckpointSnapshots:
    """Snapshots in a checkpoint directory: as durable as what lies beneath it."""

    def __init__(self, directory: CheckpointDirectory) -> None:
        self._directory = directory

    def begin(self, *, resume: bool) -> Snapshot | None:
        """Become the directory's writer; returns its newest checkpoint, None without one to resume."""
        if not resume:
            self._directory.discard()
            return None
        return _snapshot(self._directory.begin())

    def save(self, snapshot: Snapshot) -> None:
        """Commit a checkpoint."""
        self._directory.save(snapshot.round, snapshot.files, {"round": snapshot.round})

    def latest(self) -> Snapshot | None:
        """The newest checkpoint that verifies."""
        return _snapshot(self._directory.latest())


def _snapshot(loaded: Loaded | None) -> Snapshot | None:
    return None if loaded is None else Snapshot(round=loaded.round_number, files=loaded.files)
