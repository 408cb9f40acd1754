"""Settings of the local work, which travel to every replica."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparkdeep.checks import at_least, instance, one_of, positive
from sparkdeep.errors import ConfigError
from sparkdeep.optim.drift import DriftCorrection
from sparkdeep.tensors.encoding import CODECS

__all__ = ["InnerState", "LocalSettings"]

InnerState = Literal["keep", "average", "reset"]


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
