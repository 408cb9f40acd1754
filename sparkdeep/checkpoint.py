"""Checkpoints: a round is written whole under a name of its own, then one small commit file makes it count.

    rounds/<round>.<nonce>/NAME      the files; no reader looks here by itself
    commits/<round>.json             the manifest, made by one create-if-absent: it names the folder above

A crash at any point leaves either the old newest commit or the new one, never a mixture.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from sparkdeep import seams
from sparkdeep.commit import Commit, CommittedFiles, commit_name
from sparkdeep.errors import CheckpointError, ConfigError
from sparkdeep.manifest import (
    MAX_MANIFEST_BYTES,
    DamagedError,
    FileEntry,
    flat_differences,
    plain_json,
    read_bounded,
)
from sparkdeep.store_protocol import JSON, Bytes, Store

__all__ = ["CheckpointDirectory", "Loaded"]

_COMMIT = re.compile(r"commits/(\d{6,18})\.json")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The newest committed round that verified."""

    round_number: int
    """The round, as it was given to `save`."""

    state: dict[str, Any]
    """The JSON state, as it was given to `save`; tuples have become lists."""

    files: Mapping[str, bytes]
    """The files, read and verified again each time one is asked for; CheckpointError if it changed since."""

    skipped: tuple[str, ...]
    """The newer commits that were damaged, newest first, each with the reason."""


@final
class CheckpointDirectory:
    """The committed rounds of one run in one folder.

    The last `keep` rounds are kept. What this run did not write is never deleted, except by `discard`, and except
    a commit file that `latest` found damaged, when its round is committed anew (the damaged files stay).

    Args:
        store: the folder.
        identity: what makes two runs the same run; a commit of another identity is refused, not loaded.
        keep: how many of the newest rounds to keep, at least 1.

    Raises:
        ConfigError: `keep` is below 1, or `identity` is not JSON.
    """

    def __init__(self, store: Store, *, identity: Mapping[str, JSON], keep: int = 3) -> None:
        if keep < 1:
            raise ConfigError(f"keep={keep}, but at least one round must be kept to resume from; give 1 or more")
        self._store = store
        self._identity = plain_json("identity", identity)
        self._keep = keep
        self._damaged: dict[int, bytes | None] = {}  # round -> its commit's bytes when it was found damaged
        self._leavings: list[str] = []  # folders of ours that no commit names (any more)

    def rounds(self) -> list[int]:
        """Return the committed rounds, oldest first, unverified."""
        names = self._store.list("commits")
        numbers = (int(match[1]) for match in map(_COMMIT.fullmatch, names) if match)
        return sorted(number for number in numbers if commit_name(number) in names)

    def save(self, round_number: int, files: Mapping[str, Bytes], state: Mapping[str, JSON]) -> None:
        """Commit a round: durable and complete on return. Old rounds beyond `keep` are removed afterwards.

        Raises:
            CheckpointError: it could not be written, or another writer has committed this round or a later one.
                The rounds committed before are as they were.
            ConfigError: a name or the state cannot be stored.
        """
        if round_number < 0:
            raise ConfigError(f"round {round_number} cannot be committed: rounds are numbered from 0")
        try:
            ahead = [number for number in self.rounds() if number >= round_number and number not in self._damaged]
            if ahead:
                raise self._another_writer(ahead[-1], round_number)
            prefix = f"rounds/{round_number:06d}.{secrets.token_hex(8)}"
            commit = Commit(
                round_number=round_number,
                prefix=prefix,
                entries={name: FileEntry.of(data) for name, data in files.items()},
                state=plain_json("state", state),
                identity=self._identity,
            ).to_bytes()
            self._write_files(prefix, files)
            self._clear_damaged(round_number)
            seams.reach("commit", round_number=round_number)
            created = self._store.create(commit_name(round_number), commit)
        except OSError as exc:
            raise CheckpointError(
                f"round {round_number} could not be written to {self._store.uri}: {exc}; the rounds committed before "
                "are untouched. Make room or restore access there, then run again: the run resumes"
            ) from exc
        if not created:
            self._leavings.append(prefix)
            self._try_sweep()
            raise self._another_writer(round_number, round_number)
        self._damaged.pop(round_number, None)
        self._prune(round_number)

    def latest(self) -> Loaded | None:
        """Return the newest committed round whose every file verifies, or None if nothing was ever committed.

        A damaged newer commit is named in a warning and in `Loaded.skipped`.

        Raises:
            CheckpointError: every commit is damaged, one is of another run or a newer format, or the store cannot
                be read.
        """
        skipped: list[str] = []
        try:
            for round_number in reversed(self.rounds()):
                try:
                    return self._load(round_number, skipped)
                except DamagedError as exc:
                    skipped.append(f"{commit_name(round_number)}: {exc}")
                    warnings.warn(
                        f"checkpoint of round {round_number} in {self._store.uri} is damaged ({exc}); "
                        "the round before it is tried",
                        RuntimeWarning,
                        stacklevel=2,
                    )
        except OSError as exc:
            raise CheckpointError(
                f"the checkpoints in {self._store.uri} could not be read: {exc}; restore access and run again"
            ) from exc
        if skipped:
            raise CheckpointError(
                f"no checkpoint in {self._store.uri} is intact: {'; '.join(skipped)}. Restore the folder from a copy, "
                "or start over on purpose with resume=False or another checkpoint_dir"
            )
        return None

    def discard(self) -> None:
        """Forget every committed round, newest first, whoever wrote it: what starting over on purpose means.

        Raises:
            CheckpointError: the store refused; the older rounds may still be there.
        """
        try:
            for round_number in reversed(self.rounds()):
                self._remove(round_number, any_identity=True)
            self._damaged.clear()
            self._sweep()
        except OSError as exc:
            raise CheckpointError(f"the checkpoints in {self._store.uri} could not be removed: {exc}") from exc

    def _write_files(self, prefix: str, files: Mapping[str, Bytes]) -> None:
        try:
            for name, data in files.items():
                self._store.write(f"{prefix}/{name}", data)
        except BaseException as exc:
            self._leavings.append(prefix)
            if isinstance(exc, OSError):
                self._try_sweep()  # at once, as the disk may be full
            raise

    def _load(self, round_number: int, skipped: list[str]) -> Loaded:
        raw = None
        try:
            raw = read_bounded(self._store, commit_name(round_number), MAX_MANIFEST_BYTES)
            commit = Commit.from_bytes(raw, round_number)
            self._refuse_another_run(commit)
            for name in commit.entries:
                commit.read(self._store, name)
        except DamagedError:
            self._damaged[round_number] = raw
            raise
        return Loaded(
            round_number=round_number,
            state=dict(commit.state),
            files=CommittedFiles(self._store, commit),
            skipped=tuple(skipped),
        )

    def _refuse_another_run(self, commit: Commit) -> None:
        differences = flat_differences(commit.identity, self._identity)
        if differences:
            raise CheckpointError(
                f"the checkpoint of round {commit.round_number} in {self._store.uri} belongs to another run; stored "
                f"vs. now: {'; '.join(differences)}. Use another checkpoint_dir, or resume=False to start over in "
                "this one"
            )

    def _clear_damaged(self, round_number: int) -> None:
        """Make room for a round whose commit was found damaged, unless someone has replaced that commit since."""
        if round_number not in self._damaged:
            return
        name = commit_name(round_number)
        seen = self._damaged[round_number]
        try:
            replaced = seen is not None and self._store.read(name, max_bytes=MAX_MANIFEST_BYTES) != seen
        except FileNotFoundError:
            return
        if not replaced:
            self._store.delete(name)

    def _prune(self, newest: int) -> None:
        try:
            older = [number for number in self.rounds() if number < newest and number not in self._damaged]
            for round_number in older[: max(0, len(older) - (self._keep - 1))]:
                self._remove(round_number, any_identity=False)
            self._sweep()
        except OSError as exc:
            warnings.warn(
                f"round {newest} is committed, but older rounds in {self._store.uri} could not be removed: {exc}; "
                "the folder will grow",
                RuntimeWarning,
                stacklevel=3,
            )

    def _remove(self, round_number: int, *, any_identity: bool) -> None:
        """Delete a commit, and only then leave its folder to the sweep: no commit ever names missing files."""
        name = commit_name(round_number)
        try:
            commit = Commit.from_bytes(read_bounded(self._store, name, MAX_MANIFEST_BYTES), round_number)
        except (DamagedError, CheckpointError):
            if any_identity:  # which folder it stood for is not known, so that stays
                self._store.delete(name)
            return
        if any_identity or not flat_differences(commit.identity, self._identity):
            self._store.delete(name)
            self._leavings.append(commit.prefix)

    def _sweep(self) -> None:
        while self._leavings:
            self._store.delete(self._leavings[-1])
            self._leavings.pop()

    def _try_sweep(self) -> None:
        # While another error is on its way; what cannot be deleted now stays listed for the next save.
        with contextlib.suppress(OSError):
            self._sweep()

    def _another_writer(self, found: int, wanted: int) -> CheckpointError:
        return CheckpointError(
            f"round {found} is already committed in {self._store.uri} where round {wanted} should be next: another "
            "writer is at work there, or this run began without resuming. One run, one checkpoint_dir: stop the other "
            "run, resume from this folder, or use another"
        )
