"""Named failures: each message gives the value, the rule and the remedy."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CoordinatorUnreachableError",
    "DataError",
    "DivergedError",
    "ModelLoadError",
    "NonFiniteError",
    "PreflightError",
    "ProtocolError",
    "ReplicaDiedError",
    "ReplicaDiedRepeatedlyError",
    "ReplicaLostError",
    "RoundTimeoutError",
    "ShardLostError",
    "ShardMismatchError",
    "SparkdeepError",
    "UserCodeError",
    "VersionMismatchError",
]


class SparkdeepError(Exception):
    """Base of every failure that sparkdeep names itself."""


class ConfigError(SparkdeepError, ValueError):
    """A setting, alone or with another, cannot be meant: raised before anything trains."""


class PreflightError(ConfigError):
    """The session or cluster cannot run this fit: too few slots, dynamic allocation, an unpicklable model."""


class DataError(SparkdeepError, ValueError):
    """The rows do not fit what was asked: a missing column, a null, a NaN, a ragged array, too few rows."""


class ShardMismatchError(DataError):
    """A rebuilt or resumed shard does not hold the rows, in the order, that the lost one held."""


class VersionMismatchError(SparkdeepError):
    """Driver and executors run different Python, torch or sparkdeep, or one of them is missing."""


class CoordinatorUnreachableError(SparkdeepError):
    """A replica could not open a connection to the driver's coordinator."""


class ProtocolError(SparkdeepError):
    """A message on the wire was not what the protocol allows at this point."""


class CheckpointError(SparkdeepError):
    """A checkpoint cannot be written, is damaged, or belongs to another run."""


class ModelLoadError(SparkdeepError, ValueError):
    """A saved model cannot be loaded under the rules: loading runs no stored code."""


class UserCodeError(SparkdeepError):
    """The user's model, loss, metric or callable raised; never retried.

    Attributes:
        replica: number of the replica where it was raised, or None on the driver.
        host: that replica's host name, or None.
        traceback_text: the original traceback, as text.
    """

    def __init__(
        self, message: str, *, replica: int | None = None, host: str | None = None, traceback_text: str = ""
    ) -> None:
        super().__init__(message)
        self.replica = replica
        self.host = host
        self.traceback_text = traceback_text


class NonFiniteError(SparkdeepError, ArithmeticError):
    """A replica's loss or parameters became NaN or infinite; the mean never saw them.

    Attributes:
        round: the round, counted from 1, in which it happened.
        replica: the replica that reported it.
    """

    def __init__(self, message: str, *, round_number: int, replica: int) -> None:
        super().__init__(message)
        self.round = round_number
        self.replica = replica


class ReplicaLostError(SparkdeepError):
    """A replica, its executor or its host went away, or made no progress within its deadline; the round repeats.

    Attributes:
        replica: number of the replica, or None when Spark did not say which task failed.
        host: the host it ran on, when known.
    """

    def __init__(self, message: str, *, replica: int | None = None, host: str | None = None) -> None:
        super().__init__(message)
        self.replica = replica
        self.host = host


class RoundTimeoutError(ReplicaLostError):
    """A replica is alive, but has not ended a round within the deadline that earlier rounds set."""


class ReplicaDiedError(ReplicaLostError):
    """A replica's process or executor ended by itself: killed, crashed, or out of memory."""


class ReplicaDiedRepeatedlyError(SparkdeepError):
    """The same shard's replica died twice running: repeating the round once more would not help.

    Attributes:
        replica: number of the replica.
        hosts: where it died.
    """

    def __init__(self, message: str, *, replica: int, hosts: list[str]) -> None:
        super().__init__(message)
        self.replica = replica
        self.hosts = hosts


class DivergedError(SparkdeepError, ArithmeticError):
    """The loss grew beyond `divergence_factor` times the lowest: the run stopped before that round counted.

    Attributes:
        round: the round, counted from 1, that does not count.
        checkpoint: the newest round with a checkpoint, or None.
    """

    def __init__(self, message: str, *, round_number: int, checkpoint: int | None) -> None:
        super().__init__(message)
        self.round = round_number
        self.checkpoint = checkpoint


class ShardLostError(ReplicaLostError):
    """A replica does not find its shard where it runs: the shards are made anew before the round repeats."""
