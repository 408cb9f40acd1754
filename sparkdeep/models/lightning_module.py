"""A Lightning module's own training_step without a Trainer: what cannot be done without one is refused by name."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from sparkdeep.data.batches import Batch
from sparkdeep.errors import ConfigError

__all__ = [
    "WAY_OUT",
    "Clock",
    "LightningStep",
    "ModuleLog",
    "ReplicaTrainer",
    "attached",
    "is_lightning",
    "lightning_batch",
]

_LOG = logging.getLogger("sparkdeep")

WAY_OUT: Final = "Leave it out, or give training_step=lambda model, batch: ... and optimizer= yourself, which asks nothing of Lightning."
_CHANGE_TRAINING: Final = (
    *("backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step"),
    *("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"),
    *("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start"),
    *("setup", "configure_model", "configure_sharded_model"),
    *("transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer"),
)
_ONLY_WATCH: Final = (
    *("on_train_batch_end", "on_train_epoch_end", "on_train_end", "on_fit_end"),
    *("on_validation_start", "on_validation_epoch_start", "on_validation_batch_start", "on_validation_batch_end"),
    *("on_validation_epoch_end", "on_validation_end", "on_save_checkpoint", "on_load_checkpoint"),
)


def is_lightning(model: Any) -> bool:
    """Whether a model, or a class of one, is a LightningModule, without importing Lightning."""
    return _base(model) is not None


def _base(model: Any) -> type | None:
    cls = model if isinstance(model, type) else type(model)
    named = (base for base in cls.__mro__ if base.__name__ == "LightningModule")
    return next((one for one in named if one.__module__.split(".")[0] in {"lightning", "pytorch_lightning"}), None)


@final
@dataclass(frozen=True, kw_only=True)
class Clock:
    """How long a run is, as a module would ask a Trainer."""

    epochs: int
    steps_per_epoch: int
    """Local steps of the longest shard, which is the common clock of all replicas."""
    batches_per_step: int = 1


@final
class ReplicaTrainer:
    """What a module can read from `self.trainer` on a replica."""

    def __init__(self, owner: str, clock: Clock | None, epoch: int = 0, index: int = 0) -> None:
        self._owner = owner
        self.current_epoch = epoch
        self.logger = None
        self.loggers: list[Any] = []
        if clock is not None:
            self.max_epochs = clock.epochs
            self.num_training_batches = clock.steps_per_epoch * clock.batches_per_step
            self.estimated_stepping_batches = clock.epochs * clock.steps_per_epoch
            self.accumulate_grad_batches = clock.batches_per_step
            self.global_step = epoch * clock.steps_per_epoch + index // clock.batches_per_step

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = sorted(key for key in vars(self) if not key.startswith("_"))
        raise ConfigError(
            f"{self._owner} asked for self.trainer.{name}: there is no Lightning Trainer on a replica; it is told {known}. "
            f"{WAY_OUT}"
        )


@final
class ModuleLog:
    """`self.log` and `self.log_dict` of a module: means of what was logged, weighted by rows."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, int]] = {}
        self.rows = 0

    def log(self, name: str, value: Any, *_: Any, **__: Any) -> None:
        """Like `LightningModule.log`; arguments that say where a Trainer would show the value are ignored."""
        if hasattr(value, "_forward_cache"):  # a torchmetrics Metric: its value for this batch
            metric, value = value, value._forward_cache
            value = metric.compute() if value is None else value
            metric.reset()
        if isinstance(value, Tensor):
            value = value.detach()
        if not isinstance(value, Tensor | int | float) or (isinstance(value, Tensor) and value.numel() != 1):
            raise ConfigError(f"self.log({name!r}, ...) was given {type(value).__name__}; it takes one number.")
        total, rows = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + value * self.rows, rows + self.rows)

    def log_dict(self, dictionary: Mapping[str, Any], *_: Any, **__: Any) -> None:
        """Like `LightningModule.log_dict`."""
        for name, value in dictionary.items():
            self.log(name, value)

    def take(self) -> dict[str, list[float]]:
        """Name -> [sum over rows, rows] since the last call; what is not finite is left out."""
        taken = {name: [float(total), float(rows)] for name, (total, rows) in self._sums.items() if rows}
        self._sums = {}
        return {name: pair for name, pair in taken.items() if math.isfinite(pair[0])}


@final
@dataclass(frozen=True)
class LightningStep:
    """`training_step(model, batch)` for a LightningModule: its own training_step(batch, batch_idx).

    Where no gradient is needed (validation), it is its validation_step, if it has one; if that returns no loss, its
    training_step gives the validation loss.
    """

    clock: Clock | None = None
    _logs: dict[bool, ModuleLog] = field(default_factory=lambda: {True: ModuleLog(), False: ModuleLog()}, compare=False)

    @classmethod
    def of(cls, module: nn.Module) -> LightningStep:
        """The step of `module`, after looking at what it overrides.

        Raises:
            ConfigError: it optimizes by hand, or overrides a hook that would change training and is not called.
        """
        name = type(module).__name__
        if not getattr(module, "automatic_optimization", True):
            raise ConfigError(
                f"{name}.automatic_optimization is False: a replica takes its optimizer's steps itself. {WAY_OUT}"
            )
        if not _overrides(module, "training_step"):
            raise ConfigError(f"{name} has no training_step; define it, or give loss= or training_step=.")
        if refused := [hook for hook in _CHANGE_TRAINING if _overrides(module, hook)]:
            raise ConfigError(f"{name} overrides {', '.join(refused)}, which no replica calls. {WAY_OUT}")
        if "dataloader_iter" in inspect.signature(module.training_step).parameters:  # type: ignore[arg-type]
            raise ConfigError(
                f"{name}.training_step takes dataloader_iter; rows come from Spark, batch by batch. {WAY_OUT}"
            )
        if silent := [hook for hook in _ONLY_WATCH if _overrides(module, hook)]:
            _LOG.warning("%s: %s will not be called, as there is no Lightning Trainer", name, ", ".join(silent))
        return cls()

    def __getstate__(self) -> dict[str, Any]:
        return {"clock": self.clock}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "clock", state["clock"])
        object.__setattr__(self, "_logs", {True: ModuleLog(), False: ModuleLog()})

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar loss.

        Raises:
            ConfigError: the step returns no loss, or asks the Trainer for something that a replica does not know.
        """
        if torch.is_grad_enabled():
            return self._loss(model, batch, self._logs[True])
        if not _overrides(model, "validation_step"):
            return self._loss(model, batch, self._logs[False])
        given = _loss_in(self._call("validation_step", model, batch, self._logs[False]))
        return self._loss(model, batch, ModuleLog()) if given is None else given

    def take_logged(self, *, training: bool) -> dict[str, list[float]]:
        """Name -> [sum over rows, rows] of what the module logged since the last call."""
        return self._logs[training].take()

    def _loss(self, model: nn.Module, batch: Batch, log: ModuleLog) -> Tensor:
        loss = _loss_in(self._call("training_step", model, batch, log))
        if loss is None:
            raise ConfigError(
                f"{type(model).__name__}.training_step returned no loss: return it, or a dict with 'loss'. To skip a batch, "
                "as None does in Lightning, return a loss times zero."
            )
        return loss

    def _call(self, name: str, model: nn.Module, batch: Batch, log: ModuleLog) -> Any:
        step = getattr(model, name)
        takes_index = len(inspect.signature(step).parameters) > 1
        log.rows = batch.rows
        trainer = ReplicaTrainer(f"{type(model).__name__}.{name}", self.clock, batch.epoch, batch.index)
        with attached(model, trainer, log):
            return step(lightning_batch(batch), batch.index) if takes_index else step(lightning_batch(batch))


def lightning_batch(batch: Batch) -> Any:
    """What a DataLoader would have given: (x, y), or one dict where the features have names and the labels too.

    Row weights come last, or under "weight".
    """
    features, labels = batch.features, batch.labels
    if isinstance(features, dict) and (labels is None or isinstance(labels, dict)):
        return {**features, **(labels or {}), **({} if batch.weights is None else {"weight": batch.weights})}
    parts = [part for part in (features, labels, batch.weights) if part is not None]
    return tuple(parts) if len(parts) > 1 else parts[0]


def _overrides(module: nn.Module, name: str) -> bool:
    return getattr(type(module), name, None) is not getattr(_base(module), name, None)


def _loss_in(result: Any) -> Tensor | None:
    loss = result.get("loss") if isinstance(result, Mapping) else result
    return loss if isinstance(loss, Tensor) else None


@contextlib.contextmanager
def attached(model: nn.Module, trainer: ReplicaTrainer, log: ModuleLog) -> Iterator[None]:
    """For the duration of one call, `self.trainer` answers and `self.log` is recorded."""
    parts = [part for part in model.modules() if is_lightning(part)]
    for part in parts:
        part.__dict__.update(log=log.log, log_dict=log.log_dict, _trainer=trainer)
    try:
        yield
    finally:
        for part in parts:
            part.__dict__.update(_trainer=None)
            del part.__dict__["log"], part.__dict__["log_dict"]
