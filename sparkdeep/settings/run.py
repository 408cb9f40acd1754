"""Settings of a fit as frozen values, checked when they are made; unknown names are refused with a suggestion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from sparkdeep.checks import at_least, instance, not_negative, one_of, positive, refuse_unknown
from sparkdeep.errors import ConfigError
from sparkdeep.optim.aggregators import Aggregator
from sparkdeep.optim.asynchronous import Asynchronous
from sparkdeep.optim.local_work import LocalWork

__all__ = ["EarlyStopping", "RunSettings", "refuse_unknown"]

ReplicaState = Literal["local", "durable"]


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Stop when the validation score has not improved; the best round's parameters are returned.

    Args:
        patience: validations without improvement before stopping.
        monitor: "loss" or the name of a metric, of the validation rows.
        mode: whether less or more is better.
        min_delta: the least change that counts as an improvement.
    """

    patience: int = 3
    monitor: str = "loss"
    mode: Literal["min", "max"] = "min"
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        at_least("early_stopping.patience", self.patience, 1)
        one_of("early_stopping.mode", self.mode, ("min", "max"))
        not_negative("early_stopping.min_delta", self.min_delta)

    def improves(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than `best`; NaN never is."""
        if math.isnan(value):
            return False
        if best is None:
            return True
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What the driver needs to know about the run."""

    num_workers: int = 2
    """Replicas; one barrier task each."""
    epochs: int = 1
    """Passes over the data."""
    sync_every: int | Literal["epoch"] = 10
    """Local steps between averages."""
    schedule: LocalWork | None = None
    """A rule for the length of rounds, such as `PostLocal()` or `QSR(alpha)`; None: `sync_every`, from which they start."""
    work: Literal["local", "gradient"] = "local"
    """"local": replicas train; "gradient": they send the gradient of their next `sync_every` steps' rows, of all their rows
    with "epoch" (in eval mode, not augmented), and the outer optimizer alone steps, once a round."""
    portions: int | Literal["auto"] | None = None
    """With gradients of all rows: ordinary tasks, this many or 8 per worker, in place of a barrier stage's; Spark may run
    a slow one a second time elsewhere."""
    asynchronous: Asynchronous | None = None
    """`Asynchronous(n_fetch, n_push)`: replicas fetch and push within a round, and the driver takes each push as it comes."""
    aggregator: Aggregator | Literal["mean"] = "mean"
    """"mean", or another way to make one of a round's updates, such as `Median()`."""
    time_budget_s: float | None = None
    """Seconds that every replica trains between averages, in place of `sync_every`: each takes the steps that it can."""
    weighting: Literal["auto", "rows", "equal", "fednova"] = "auto"
    """How much a replica counts: by its "rows", all "equal", or corrected for unequal steps ("fednova"); "auto":
    "fednova" with `time_budget_s` or `DyLU`, else "rows"."""
    quorum: int | None = None
    """This many updates close a round, without the slowest; None: all of them."""
    quorum_grace_s: float = 1.0
    """How long a round that has its quorum waits for the others."""
    min_workers: int | None = None
    """The least number of replicas to go on with when executors do not come back; None: it waits for all."""
    replacement_timeout_s: float = 60.0
    """How long a lost executor's replacement is waited for before the run goes on with fewer."""
    on_nonfinite: Literal["error", "drop", "rollback"] = "error"
    """A replica with NaN or infinity ends the fit ("error"), is left out of the round ("drop"), or takes all replicas
    back to where the round began ("rollback")."""
    divergence_factor: float | None = None
    """A round whose loss exceeds the lowest so far times this ends the fit before it counts."""
    validate_every: int | Literal["epoch"] = "epoch"
    """Rounds between validations, or the end of each epoch."""
    early_stopping: EarlyStopping | None = None
    """When to stop before `epochs` are over."""
    aggregation: Literal["auto", "star", "ring"] = "auto"
    """"star": every update goes to the driver; "ring": replicas add theirs up among themselves, each a part, and the driver
    is sent the mean once; "auto": chosen once, from the number of replicas, the size and the bandwidth."""
    plain_ring: bool = False
    """Allows "ring" where Spark encrypts or authenticates: a ring's connections between replicas do neither."""
    rounds_per_stage: int | Literal["auto"] = "auto"
    """Rounds per barrier stage; "auto": enough to keep the launching of stages under 5 % of the time."""
    max_stage_s: float = 60.0
    """No stage stays open longer, except for a single round that is longer itself."""
    replica_state: ReplicaState = "local"
    """"local": state is kept on the executor's disk after every round; "durable": with the driver or the checkpoint."""
    checkpoint_every: int = 10
    """Rounds between checkpoints (with `checkpoint_dir`) or durable snapshots (`replica_state="durable"`)."""
    on_checkpoint_error: Literal["raise", "warn"] = "raise"
    """When a checkpoint cannot be written (disk full, access lost): "raise", or "warn", go on, and say so in the
    round's record. Either way the earlier checkpoints stay intact. A driver that was superseded in its folder always fails."""
    max_retries: int = 3
    """Attempts to repeat a failed round before the fit fails."""
    retry_backoff_s: float = 1.0
    """Wait before the first repetition; doubles with each further one."""
    open_timeout_s: float = 300.0
    """How long slots, executors and replicas may take to be ready when a stage opens."""
    stall_timeout_s: float = 300.0
    """A replica that has not finished a single batch for this long counts as lost."""
    min_round_timeout_s: float = 300.0
    """A round may take ten times the median of those before it, and never less than this."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "epochs", "checkpoint_every"):
            at_least(name, getattr(self, name), 1)
        for name, word in (("sync_every", "epoch"), ("validate_every", "epoch"), ("rounds_per_stage", "auto")):
            value = getattr(self, name)
            if isinstance(value, str) and value != word:
                raise ConfigError(f"{name}={value!r}: must be {word!r} or a whole number of at least 1.")
            if not isinstance(value, str):
                at_least(name, value, 1)
        at_least("max_retries", self.max_retries, 0)
        for name in (
            "max_stage_s",
            "retry_backoff_s",
            "open_timeout_s",
            "stall_timeout_s",
            "min_round_timeout_s",
            "replacement_timeout_s",
        ):
            positive(name, getattr(self, name))
        self._check_closing()
        one_of("aggregation", self.aggregation, ("auto", "star", "ring"))
        one_of("replica_state", self.replica_state, ("local", "durable"))
        one_of("on_checkpoint_error", self.on_checkpoint_error, ("raise", "warn"))
        if self.replica_state == "durable" and self.on_checkpoint_error == "warn":
            raise ConfigError(
                "on_checkpoint_error='warn' with replica_state='durable': rounds would count whose replica state is nowhere "
                "but with the replicas, and a lost one would take the run back further than checkpoint_every rounds. Use "
                "replica_state='local', or on_checkpoint_error='raise'."
            )

    def _check_closing(self) -> None:
        for name in ("quorum", "min_workers"):
            if (value := getattr(self, name)) is not None:
                at_least(name, value, 1)
                if value > self.num_workers:
                    raise ConfigError(
                        f"{name}={value}: there are num_workers={self.num_workers} replicas; give at most that."
                    )
        for name in ("time_budget_s", "divergence_factor"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        if self.divergence_factor is not None and self.divergence_factor <= 1:
            raise ConfigError(f"divergence_factor={self.divergence_factor!r}: must be above 1, such as 10.")
        not_negative("quorum_grace_s", self.quorum_grace_s)
        one_of("weighting", self.weighting, ("auto", "rows", "equal", "fednova"))
        one_of("on_nonfinite", self.on_nonfinite, ("error", "drop", "rollback"))
        self._check_algorithm()

    def _check_algorithm(self) -> None:
        one_of("work", self.work, ("local", "gradient"))
        if self.portions not in (None, "auto"):
            at_least("portions", self.portions, 1)
        instance("schedule", self.schedule, LocalWork)
        instance("asynchronous", self.asynchronous, Asynchronous)
        instance("aggregator", self.aggregator, Aggregator, "mean")

    @property
    def stateless(self) -> bool:
        """Whether ordinary tasks, which keep no state, do the work in place of replicas."""
        return self.portions is not None

    @property
    def num_tasks(self) -> int:
        """Replicas, or the ordinary tasks that work in their place."""
        return 8 * self.num_workers if self.portions == "auto" else self.portions or self.num_workers

    @property
    def gradient(self) -> Literal["", "batches", "all"]:
        """Which rows a round's gradient is of, as decided; "" where replicas train."""
        if self.work == "local":
            return ""
        return "all" if self.sync_every == "epoch" else "batches"

    @property
    def own_clocks(self) -> bool:
        """Whether each replica takes its own number of steps."""
        return self.time_budget_s is not None or (self.schedule is not None and self.schedule.own_clock)

    @property
    def shares(self) -> Literal["rows", "equal", "fednova"]:
        """How much each replica counts, as decided."""
        if self.weighting != "auto":
            return self.weighting
        return "fednova" if self.own_clocks and self.asynchronous is None else "rows"

    @property
    def fednova(self) -> bool:
        """Whether unequal numbers of steps are corrected for."""
        return self.shares == "fednova"

    @property
    def closing(self) -> list[str]:
        """The settings in use that need a driver which takes in the updates itself."""
        asked = {
            "quorum": self.quorum,
            "on_nonfinite": None if self.on_nonfinite == "error" else self.on_nonfinite,
            "time_budget_s": self.time_budget_s,
            "weighting": self.weighting if self.weighting in ("equal", "fednova") else None,
            "schedule": self.schedule if self.schedule is not None and not self.schedule.alike else None,
            "work": None if self.work == "local" else self.work,
            "asynchronous": self.asynchronous,
            "aggregator": None if self.aggregator == "mean" else self.aggregator,
        }
        return [f"{name}={value!r}" for name, value in asked.items() if value is not None]


_S = TypeVar("_S")


def from_mapping(cls: type[_S], values: Mapping[str, Any]) -> _S:
    """Build a settings class from names and values, refusing unknown names."""
    refuse_unknown(values, [f.name for f in fields(cls)], f"{cls.__name__} setting")  # type: ignore[arg-type]
    return cls(**values)
