"""What the driver refuses of a replica's words, by name: other versions, another shard, an update that may not be counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from sparkdeep.errors import (
    NonFiniteError,
    ProtocolError,
    ReplicaLostError,
    ShardMismatchError,
    SparkdeepError,
    UserCodeError,
    VersionMismatchError,
)
from sparkdeep.protocol.messages import Failure, Hello, Update
from sparkdeep.protocol.plans import ShardFacts

__all__ = [
    "MAX_SECTIONS",
    "check_shard",
    "check_update",
    "check_updates",
    "check_versions",
    "common_sections",
    "failed",
    "not_finite",
]

MAX_SECTIONS: Final = 8
"""Optimizer states that replicas may average, at most."""


def check_versions(own: dict[str, str], hellos: Sequence[Hello]) -> None:
    """Refuse replicas that run other versions than the driver's, `own`.

    Raises:
        VersionMismatchError: with a table.
    """
    if any(hello.versions != own for hello in hellos):
        table = "\n".join(f"  {h.host}: {h.versions}" for h in hellos)
        raise VersionMismatchError(
            f"driver and executors must run the same versions.\n  driver: {own}\n{table}\nInstall the driver's versions "
            "on the executors, or set spark.pyspark.python to an environment that has them."
        )


def check_shard(hello: Hello, facts: ShardFacts) -> None:
    """Refuse a replica whose shard is not the one that the ledger knows.

    Raises:
        ShardMismatchError: it was rebuilt from other rows, or in another order.
    """
    if (hello.digest, hello.rows) != (facts.digest, facts.rows):
        raise ShardMismatchError(
            f"the shard of replica {hello.replica} on {hello.host} was rebuilt with other rows, or in another "
            f"order: digest {hello.digest[:16]} of {hello.rows}, before {facts.digest[:16]} of {facts.rows}. The "
            "DataFrame is not deterministic (rand(), an unordered limit, a source that changed): write it to "
            "Parquet or a table first and fit from that."
        )


def check_update(replica: int, host: str, update: Update, round_number: int, *, allow_nonfinite: bool = False) -> None:
    """Refuse a header that must not be counted.

    Raises:
        NonFiniteError: the replica reports NaN or infinity, and that is not allowed; nothing was added.
        ProtocolError: the header does not belong to this round or makes no sense.
    """
    if update.round != round_number:
        raise ProtocolError(f"replica {replica} sent an update of round {update.round} in round {round_number}.")
    if not update.finite and not allow_nonfinite:
        raise not_finite(replica, host, round_number)
    negative = update.rows < 0 or (update.logged and not update.rows)  # what is logged is averaged over rows
    if not 0 <= update.weight < math.inf or negative or len(update.sections) > MAX_SECTIONS:
        raise ProtocolError(f"replica {replica} sent an update of weight {update.weight}, rows {update.rows}.")


def check_updates(updates: Sequence[Update], hosts: Sequence[str], round_number: int) -> list[str]:
    """Refuse a round of which one header is not good; gives what `common_sections` gives.

    Raises:
        NonFiniteError, ProtocolError: see `check_update`.
    """
    for replica, (update, host) in enumerate(zip(updates, hosts, strict=True)):
        check_update(replica, host, update, round_number)
    return common_sections(updates)


def not_finite(replica: int, host: str, round_number: int, more: str = "") -> NonFiniteError:
    """The error of a replica whose loss or parameters are NaN or infinite."""
    return NonFiniteError(
        f"round {round_number}: the loss or the parameters of replica {replica} on {host} became NaN or infinite; "
        f"the mean was not touched.{more} Lower the learning rate, set clip_grad_norm=, or check the data for values "
        "that overflow.",
        round_number=round_number,
        replica=replica,
    )


def failed(failure: Failure, hello: Hello) -> SparkdeepError:
    """The error of a replica whose last words were `failure`."""
    if failure.cause == "user":
        return UserCodeError(
            f"{failure.traceback.rstrip()}\n\n{failure.message}\n(raised on {hello.who}, in {failure.where}; not retried)",
            replica=hello.replica,
            host=hello.host,
            traceback_text=failure.traceback,
        )
    text = f"{hello.who} failed in {failure.where}: {failure.message}\n{failure.traceback.rstrip()}"
    if failure.cause == "lost":
        return ReplicaLostError(text, replica=hello.replica, host=hello.host)
    return SparkdeepError(text)


def common_sections(updates: Sequence[Update]) -> list[str]:
    """Names of the optimizer state that the replicas which count average.

    Raises:
        ProtocolError: they do not agree.
    """
    sections = {tuple(update.sections) for update in updates if update.weight > 0}
    if len(sections) > 1:
        raise ProtocolError(f"replicas average different optimizer states: {sorted(sections)}.")
    return list(sections.pop()) if sections else []
