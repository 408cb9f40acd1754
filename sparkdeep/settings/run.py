"""Settings of a fit, the replicas' and the driver's, as frozen values that are checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from sparkdeep.checks import at_least, instance, not_negative, one_of, positive, refuse_unknown
from sparkdeep.errors import ConfigError
from sparkdeep.optim.aggregators import Aggregator
from sparkdeep.optim.asynchronous import Asynchronous
from sparkdeep.optim.drift import DriftCorrection
from sparkdeep.optim.local_work import LocalWork
from sparkdeep.tensors.encoding import CODECS

__all__ = ["EarlyStopping", "InnerState", "LocalSettings", "RunSettings", "refuse_unknown"]

InnerState = Literal["keep", "average", "reset"]
ReplicaState = Literal["local", "durable"]


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """What every replica needs to know about its local work; it travels to the executors."""

    batch_size: int = 32
    """Rows per batch and replica; the global batch is `num_workers` times as large."""
    accumulate_batches: int = 1
    """Batches per local step; their gradients add up to the gradient of one batch of all their rows."""
    clip_grad_norm: float | None = None
    """Largest 2-norm of the whole gradient in a local step (`torch.nn.utils.clip_grad_norm_`), or in a gradient round."""
    precision: Literal["bf16"] | None = None
    """"bf16": forward and loss under `torch.autocast` in bfloat16; parameters keep their dtype."""
    inner_state: InnerState = "keep"
    """The replica's optimizer state between rounds: its own, the replicas' mean, or started anew each round. A replica that
    joins a run anew, after its executor was lost or its rows were dealt again, begins without state in each case."""
    drift_correction: DriftCorrection | None = None
    """`FedProx(mu)` or `Scaffold()`: what is added to a replica's gradient where shards are unlike each other."""
    seed: int = 0
    """Seed of the order of rows and of each replica's random numbers (`seed + replica`)."""
    block_rows: int = 4096
    """Contiguous rows read together when a shard exceeds `window_rows`."""
    window_rows: int = 1 << 20
    """Rows shuffled together; a shard of at most this many is shuffled as a whole."""
    codec: str = "identity"
    """Codec of updates, on their way to the driver: "identity" is every bit, "bf16" half the bytes, "int8" a quarter."""
    down_codec: str = "identity"
    """Codec of what changed in the global parameters, on its way to replicas; the driver's own copy stays exact."""
    error_feedback: bool = False
    """Whether a replica adds what `codec` lost of an update to its next one."""
    overlap: int = 0
    """1: a round's update travels while the next round is trained, and its mean is merged one round late."""
    overlap_mix: float | None = None
    """The share of a replica's own parameters when it merges, as in Streaming DiLoCo; None: all of its progress is kept."""
    overlap_fragments: int = 1
    """In how many pieces vectors travel, spread over the round that is trained meanwhile."""
    prefetch: int | Literal["auto"] = "auto"
    """Batches gathered ahead by a thread, 0 for none; "auto": 2 on a GPU, none on a CPU, whose thread computes all the time."""
    device: str = "auto"
    """"auto" (the GPU that Spark gave the task, else the CPU), "cpu" or a torch device such as "cuda:0"."""

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size, 1)
        at_least("accumulate_batches", self.accumulate_batches, 1)
        at_least("block_rows", self.block_rows, 1)
        at_least("window_rows", self.window_rows, 1)
        at_least("seed", self.seed, 0)
        if self.prefetch != "auto":
            at_least("prefetch", self.prefetch, 0)
        if self.clip_grad_norm is not None:
            positive("clip_grad_norm", self.clip_grad_norm)
        one_of("precision", self.precision, (None, "bf16"))
        one_of("inner_state", self.inner_state, ("keep", "average", "reset"))
        instance("drift_correction", self.drift_correction, DriftCorrection)
        self._check_exchange()
        if self.window_rows < self.block_rows:
            raise ConfigError(
                f"window_rows={self.window_rows} is smaller than block_rows={self.block_rows}: a window holds whole "
                "blocks. Raise window_rows or lower block_rows."
            )

    def _check_exchange(self) -> None:
        for name in ("codec", "down_codec"):
            one_of(name, getattr(self, name), CODECS)
        one_of("overlap", self.overlap, (0, 1))
        at_least("overlap_fragments", self.overlap_fragments, 1)
        if self.error_feedback and not CODECS[self.codec].lossy:
            raise ConfigError(
                f"error_feedback=True with codec={self.codec!r}: nothing is lost that could be fed back. Choose codec='int8' or "
                "'bf16', or leave error_feedback out."
            )
        if self.inner_state == "average" and (self.codec != "identity" or self.overlap):
            raise ConfigError(
                f"inner_state='average' with codec={self.codec!r}, overlap={self.overlap}: averaged optimizer state travels with "
                "the parameters, whole and in time. Use inner_state='keep', or codec='identity' and overlap=0."
            )
        mix = self.overlap_mix
        if mix is not None and (isinstance(mix, bool) or not isinstance(mix, int | float) or not 0 <= mix <= 1):
            raise ConfigError(f"overlap_mix={mix!r}: must be a number from 0 to 1, or None.")
        for name, value, default in (("overlap_mix", mix, None), ("overlap_fragments", self.overlap_fragments, 1)):
            if not self.overlap and value != default:
                raise ConfigError(f"{name}={value!r} is for overlap=1: set overlap=1, or leave {name} out.")


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
