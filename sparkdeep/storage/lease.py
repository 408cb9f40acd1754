"""Who may write to a folder of checkpoints: the driver that came last; what an earlier one still writes is void.

    leases/<epoch>.json              made by one create-if-absent; each epoch is a driver that took over

A driver first takes the next epoch, and from then on the one before commits nothing more; only then does it look which
round is the newest, and says so in its lease: whatever an older epoch commits after that round never counts.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import warnings
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, final

from sparkdeep.errors import CheckpointError, FencedError
from sparkdeep.storage.manifest import DamagedError, decode, encode, read_bounded
from sparkdeep.storage.store import Store

__all__ = [
    "Fences",
    "Lease",
    "check_lease",
    "epochs",
    "is_held",
    "lease_name",
    "newest_lease",
    "state_start",
    "take_lease",
]

FORMAT_VERSION = 1
MAX_LEASE_BYTES = 4 << 20
_NAME = re.compile(r"leases/(\d{6,18})\.json")
_MAX_TRIES = 100  # each attempt that is lost means that another driver took over at that moment


def lease_name(epoch: int) -> str:
    """Return the name of an epoch's lease."""
    return f"leases/{epoch:06d}.json"


@final
@dataclass(frozen=True, kw_only=True)
class Fences:
    """Which commits count: every takeover in the folder's life, so that older lease files may be deleted."""

    takeovers: tuple[tuple[int, int], ...] = ()
    """(epoch, after): what lower epochs committed after round `after` is void. Both ascend."""

    def void(self, epoch: int, round_number: int) -> bool:
        """Whether the commit of `round_number` by the writer of `epoch` does not count."""
        return any(epoch < taker and round_number > after for taker, after in self.takeovers)

    def and_then(self, epoch: int, after: int) -> Fences:
        """These, and a takeover by `epoch`; those that it makes redundant are left out."""
        kept = tuple((taker, at) for taker, at in self.takeovers if at < after)
        return Fences(takeovers=(*kept, (epoch, after)))


@final
@dataclass(frozen=True, kw_only=True)
class Lease:
    """One driver's right to commit."""

    epoch: int
    """The fencing token: higher ones are later."""

    after: int | None
    """The round from which this driver went on, -1 for none; None until it has found out, and has committed nothing."""

    fences: Fences
    """The takeovers before this one."""

    owner: str
    """A random name, by which two drivers that both believe they hold the epoch are told apart."""

    host: str
    pid: int

    since: str
    """When it was taken, in UTC."""

    def all_fences(self) -> Fences:
        """The takeovers, including this one once it has said from where it goes on."""
        return self.fences if self.after is None else self.fences.and_then(self.epoch, self.after)

    def described(self) -> str:
        """Who holds it, for messages."""
        return f"process {self.pid} on {self.host}, which took over at {self.since}"

    def to_bytes(self) -> bytes:
        """Return the lease file."""
        return encode(
            {
                "format_version": FORMAT_VERSION,
                "epoch": self.epoch,
                "after": self.after,
                "takeovers": [list(pair) for pair in self.fences.takeovers],
                "owner": self.owner,
                "host": self.host,
                "pid": self.pid,
                "since": self.since,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, epoch: int) -> Lease:
        """Check and read the lease of `epoch`.

        Raises:
            DamagedError: it is not as it was written, or is of another epoch.
            CheckpointError: it is intact, but of a format that this version does not read.
        """
        body = decode(data)
        if body.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"the lease {lease_name(epoch)} has format {str(body.get('format_version'))[:40]}; this sparkdeep reads "
                f"format {FORMAT_VERSION}. Use the version that wrote it, or another checkpoint_dir"
            )
        after, pairs = body.get("after"), body.get("takeovers")
        if body.get("epoch") != epoch or not (after is None or _whole(after)):
            raise DamagedError(f"it says epoch {str(body.get('epoch'))[:40]}, after {str(after)[:40]}")
        if not isinstance(pairs, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and all(map(_whole, pair)) for pair in pairs
        ):
            raise DamagedError(f"its takeovers are {str(pairs)[:100]}, not pairs of whole numbers")
        if not _whole(body.get("pid")):
            raise DamagedError(f"its pid is {str(body.get('pid'))[:40]}")
        texts = {name: str(body.get(name))[:200] for name in ("owner", "host", "since")}
        fences = Fences(takeovers=tuple((epoch, after) for epoch, after in pairs))
        return cls(epoch=epoch, after=after, fences=fences, pid=body["pid"], **texts)


def epochs(store: Store) -> list[int]:
    """Return the epochs of the leases that are there, ascending."""
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, store.list("leases")) if match)


def newest_lease(store: Store, *, warn: bool = True) -> Lease | None:
    """Return the newest lease that can be read, or None.

    One that cannot be read is skipped with a warning: a driver that died while taking over has committed nothing.

    Raises:
        CheckpointError: it is of a newer format.
        OSError: the store cannot be read.
    """
    for epoch in reversed(epochs(store)):
        try:
            return Lease.from_bytes(read_bounded(store, lease_name(epoch), MAX_LEASE_BYTES), epoch)
        except DamagedError as exc:
            if warn:
                warnings.warn(
                    f"the lease {lease_name(epoch)} in {store.uri} is damaged ({exc}); the one before it is believed",
                    RuntimeWarning,
                    stacklevel=2,
                )
    return None


def take_lease(store: Store, *, least: int) -> Lease:
    """Take over: from now on the previous driver cannot commit. The lease does not yet say from where this one goes on.

    Args:
        store: the folder.
        least: the epoch is higher than this too: commits may outlive the leases under which they were made.

    Raises:
        CheckpointError: other drivers keep taking over.
        OSError: the store cannot be written.
    """
    for _ in range(_MAX_TRIES):
        before = newest_lease(store, warn=False)
        epoch = max([least, *epochs(store)]) + 1
        lease = Lease(
            epoch=epoch,
            after=None,
            fences=before.all_fences() if before is not None else Fences(),
            owner=secrets.token_hex(16),
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if store.create(lease_name(epoch), lease.to_bytes()) and is_held(store, lease):
            return lease
    raise CheckpointError(
        f"{store.uri} was taken over by other drivers {_MAX_TRIES} times while this one tried to: one run, one "
        "checkpoint_dir. Stop the other runs, or use another folder"
    )


def state_start(store: Store, lease: Lease, after: int) -> Lease:
    """Say in the lease from which round its driver goes on; returns it as it is now.

    Raises:
        OSError: the store cannot be written.
    """
    told = replace(lease, after=after)
    store.write(lease_name(lease.epoch), told.to_bytes())
    return told


def is_held(store: Store, lease: Lease) -> bool:
    """Whether nobody else has written this epoch's lease, which is possible where `create` is not atomic."""
    if store.conditional:
        return True
    try:
        found = Lease.from_bytes(read_bounded(store, lease_name(lease.epoch), MAX_LEASE_BYTES), lease.epoch)
    except DamagedError:
        return False
    return found.owner == lease.owner


def check_lease(store: Store, lease: Lease) -> None:
    """Return if `lease` is the newest, and its epoch still this driver's.

    Raises:
        FencedError: another driver took over.
        OSError: the store cannot be read.
    """
    later = [epoch for epoch in epochs(store) if epoch > lease.epoch]
    if not later and is_held(store, lease):
        return
    newest = newest_lease(store, warn=False)
    known = newest is not None and newest.owner != lease.owner and newest.epoch >= max([lease.epoch, *later])
    by = newest.described() if known and newest is not None else "another driver, whose lease cannot be read"
    raise FencedError(
        f"{store.uri} is now written by {by}: this driver's lease, of {lease.since}, is epoch {lease.epoch}, and theirs "
        f"{max([lease.epoch, *later])}. Nothing of what this one would still save counts. One run, one checkpoint_dir: let "
        "the other one finish, or stop it and make this fit again, which resumes"
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
