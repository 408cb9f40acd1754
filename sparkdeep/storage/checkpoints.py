"""Checkpoints: a round is written whole under a name of its own, then one small commit file makes it count.

    rounds/<round>.<nonce>/NAME      the files; no reader looks here by itself
    commits/<round>.<epoch>.json     the manifest, made by one create-if-absent: it names the folder above
    leases/<epoch>.json              which driver writes here, and from which round on (see `lease`)

A crash at any point leaves either the old newest commit or the new one, never a mixture. Of two drivers on one folder
the later one goes on; the earlier is stopped at its next save, and what it wrote in between does not count.
"""

from __future__ import annotations

import contextlib
import secrets
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from sparkdeep import seams
from sparkdeep.errors import CheckpointError, ConfigError, FencedError
from sparkdeep.storage.lease import (
    Fences,
    Lease,
    check_lease,
    epochs,
    lease_name,
    newest_lease,
    state_start,
    take_lease,
)
from sparkdeep.storage.manifest import (
    MAX_MANIFEST_BYTES,
    Commit,
    CommittedFiles,
    DamagedError,
    FileEntry,
    Key,
    commit_keys,
    commit_name,
    flat_differences,
    plain_json,
    read_bounded,
)
from sparkdeep.storage.own_names import SAID_LATER, without_modules
from sparkdeep.storage.store import JSON, Bytes, Store, check_name

__all__ = ["CheckpointDirectory", "Loaded"]


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
    commits that a takeover made void.

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
        self._lease: Lease | None = None
        self._newest: int | None = None  # the round that this driver has read or written last, -1 for none
        self._leavings: list[str] = []  # our own folders that no commit names, or none names any longer

    def rounds(self) -> list[int]:
        """Return the committed rounds that count, oldest first, unverified."""
        return sorted({round_number for round_number, _ in self._keys(warn=False)})

    def begin(self) -> Loaded | None:
        """Take the folder over and return its newest round; an earlier driver commits nothing more from here on.

        A folder from which the run cannot go on is refused first, and its writer is left alone.

        Raises:
            CheckpointError: as `latest`, or the folder cannot be written.
        """
        loaded, seen = self._find()
        with self._failing("taken over"):
            self._lease = take_lease(self._store, least=self._last_epoch())
        if self._keys(warn=False) != seen:  # the previous driver has committed once more
            loaded, _ = self._find()
        self._start(-1 if loaded is None else loaded.round_number)
        return loaded

    def discard(self) -> None:
        """Take the folder over and forget every committed round, whoever wrote it: the run is to start over.

        Raises:
            CheckpointError: the store refused. Once the lease says so no round counts, whether or not its files are
                still there.
        """
        with self._failing("emptied"):
            self._lease = take_lease(self._store, least=self._last_epoch())
            self._start(-1)
            for key in reversed(commit_keys(self._store.list("commits"))):
                self._remove(key, any_identity=True)
            self._sweep()

    def save(self, round_number: int, files: Mapping[str, Bytes], state: Mapping[str, JSON]) -> None:
        """Commit a round: durable and complete on return. Old rounds beyond `keep` are removed afterwards.

        Raises:
            FencedError: another driver has taken over.
            CheckpointError: it could not be written, or this round or a later one is committed already. The rounds
                committed before are as they were.
            ConfigError: a name or the state cannot be stored.
        """
        if round_number < 0:
            raise ConfigError(f"round {round_number} cannot be committed: rounds are numbered from 0")
        entries = {check_name(name): FileEntry.of(data) for name, data in files.items()}
        told = plain_json("state", state)
        try:
            lease = self._held(round_number)
            check_lease(self._store, lease)
            prefix = f"rounds/{round_number:06d}.{secrets.token_hex(8)}"
            commit = Commit(
                round_number=round_number,
                epoch=lease.epoch,
                prefix=prefix,
                entries=entries,
                state=told,
                identity=self._identity,
            ).to_bytes()
            self._write_files(prefix, files)
            self._commit(lease, round_number, prefix, commit)
        except OSError as exc:
            raise CheckpointError(
                f"round {round_number} could not be written to {self._store.uri}: {exc}; the rounds committed before "
                "are untouched. Make room or restore access there, then run again: the run resumes"
            ) from exc
        self._prune(lease, round_number)

    def latest(self) -> Loaded | None:
        """Return the newest committed round whose every file verifies, or None if nothing was ever committed.

        A damaged newer commit is named in a warning and in `Loaded.skipped`.

        Raises:
            FencedError: another driver has taken over from this one.
            CheckpointError: every commit is damaged, one is of another run or another format, or the store cannot be
                read.
        """
        if self._lease is not None:
            with self._failing("read"):
                check_lease(self._store, self._lease)
        return self._find()[0]

    def _find(self) -> tuple[Loaded | None, list[Key]]:
        """The newest round that verifies, and the commits that counted when it was looked for."""
        skipped: list[str] = []
        with self._failing("read"):
            keys = self._keys(warn=True)
            for key in reversed(keys):
                try:
                    loaded = self._load(key, skipped)
                    self._newest = loaded.round_number
                    self._clear_own(keys, loaded.round_number)
                    return loaded, keys
                except DamagedError as exc:
                    skipped.append(f"{commit_name(key)}: {exc}")
                    warnings.warn(
                        f"checkpoint of round {key[0]} in {self._store.uri} is damaged ({exc}); "
                        "the round before it is tried",
                        RuntimeWarning,
                        stacklevel=3,
                    )
        if skipped:
            raise CheckpointError(
                f"no checkpoint in {self._store.uri} is intact: {'; '.join(skipped)}. Restore the folder from a copy, "
                "or start over on purpose with resume=False or another checkpoint_dir"
            )
        self._newest = -1
        return None, keys

    def _clear_own(self, keys: list[Key], round_number: int) -> None:
        """Remove this driver's own damaged commits: their rounds come again, under the same names."""
        for number, epoch in keys:
            if self._lease is not None and epoch == self._lease.epoch and number > round_number:
                self._store.delete(commit_name((number, epoch)))

    def _keys(self, *, warn: bool) -> list[Key]:
        """The commits that count, oldest first."""
        # Leases first: a driver that takes over in between takes the epoch that this one would take next, and so stops
        # it.
        lease = newest_lease(self._store, warn=warn)
        fences = lease.all_fences() if lease is not None else Fences()
        return [key for key in commit_keys(self._store.list("commits")) if not fences.void(key[1], key[0])]

    def _last_epoch(self) -> int:
        return max([0, *(epoch for _, epoch in commit_keys(self._store.list("commits")))])

    def _held(self, round_number: int) -> Lease:
        """The lease; a driver that has not begun takes it now, and goes on after the round that it knows of."""
        newest = self._newest
        if newest is None:
            newest = max(self.rounds(), default=-1)
        if round_number <= newest:
            raise CheckpointError(
                f"round {newest} is already committed in {self._store.uri} where round {round_number} should be next: "
                "this run began without resuming. Resume from this folder, or use another"
            )
        if self._lease is None:
            self._lease = take_lease(self._store, least=self._last_epoch())
            return self._start(newest)
        return self._lease

    def _start(self, after: int) -> Lease:
        assert self._lease is not None
        with self._failing("taken over"):
            check_lease(self._store, self._lease)
            self._lease = state_start(self._store, self._lease, after)
        self._newest = after
        return self._lease

    def _commit(self, lease: Lease, round_number: int, prefix: str, commit: bytes) -> None:
        """Make the round count; if another driver has taken over, before or while it was made, it is taken back."""
        key = (round_number, lease.epoch)
        created = False
        try:
            check_lease(self._store, lease)
            seams.reach("commit", round_number=round_number)
            created = self._store.create(commit_name(key), commit)
            if not created:
                raise FencedError(
                    f"round {round_number} of epoch {lease.epoch} is committed in {self._store.uri} by another driver: this "
                    "store cannot tell two that take over at the same moment apart. One run, one checkpoint_dir: stop one"
                )
            check_lease(self._store, lease)
        except FencedError:
            if not created or key not in self._keys(warn=False):
                if created:
                    self._store.delete(commit_name(key))
                self._leavings.append(prefix)
                self._try_sweep()
            raise
        self._newest = round_number

    def _write_files(self, prefix: str, files: Mapping[str, Bytes]) -> None:
        try:
            for name, data in files.items():
                self._store.write(f"{prefix}/{name}", data)
        except BaseException as exc:
            self._leavings.append(prefix)
            if isinstance(exc, OSError):
                self._try_sweep()  # at once, as the disk may be full
            raise

    def _load(self, key: Key, skipped: list[str]) -> Loaded:
        commit = Commit.from_bytes(read_bounded(self._store, commit_name(key), MAX_MANIFEST_BYTES), key)
        if differences := self._differences(commit):
            raise CheckpointError(
                f"the checkpoint of round {commit.round_number} in {self._store.uri} belongs to another run; stored "
                f"vs. now: {'; '.join(differences)}. Use another checkpoint_dir, or resume=False to start over in "
                "this one"
            )
        for name in commit.entries:
            commit.read(self._store, name)
        return Loaded(
            round_number=commit.round_number,
            state=dict(commit.state),
            files=CommittedFiles(self._store, commit),
            skipped=tuple(skipped),
        )

    def _differences(self, commit: Commit) -> list[str]:
        # What the version that wrote it did not say is not compared.
        own = {key: value for key, value in self._identity.items() if key in commit.identity or key not in SAID_LATER}
        return flat_differences(without_modules(commit.identity), without_modules(own))

    def _prune(self, lease: Lease, newest: int) -> None:
        fences = lease.all_fences()
        try:
            keys = commit_keys(self._store.list("commits"))
            void = [(number, epoch) for number, epoch in keys if fences.void(epoch, number)]
            older = [key for key in keys if key[0] < newest and key not in void]
            for key in [*void, *older[: max(0, len(older) - (self._keep - 1))]]:
                self._remove(key, any_identity=False, unreadable=key in void)
            for epoch in epochs(self._store):
                if epoch < lease.epoch:  # the newest lease repeats what the older ones say
                    self._store.delete(lease_name(epoch))
            self._sweep()
        except OSError as exc:
            warnings.warn(
                f"round {newest} is committed, but older rounds in {self._store.uri} could not be removed: {exc}; "
                "the folder will grow",
                RuntimeWarning,
                stacklevel=3,
            )

    def _remove(self, key: Key, *, any_identity: bool, unreadable: bool = False) -> None:
        """Delete a commit, and only then leave its folder to the sweep: no commit ever names missing files."""
        name = commit_name(key)
        try:
            commit = Commit.from_bytes(read_bounded(self._store, name, MAX_MANIFEST_BYTES), key)
        except (DamagedError, CheckpointError):
            if any_identity or unreadable:  # which folder it stood for is unknown, so that folder stays
                self._store.delete(name)
            return
        if any_identity or not self._differences(commit):
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

    @contextlib.contextmanager
    def _failing(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise CheckpointError(
                f"the checkpoints in {self._store.uri} could not be {done}: {exc}; restore access and run again"
            ) from exc
