"""A Lightning module's own configure_optimizers: one optimizer, one scheduler, clocked by steps or epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from sparkdeep.errors import ConfigError
from sparkdeep.models.lightning_module import WAY_OUT, Clock, ModuleLog, ReplicaTrainer, attached

__all__ = ["LightningOptimizer"]


class LightningOptimizer:
    """An optimizer factory for a LightningModule: its own configure_optimizers().

    Args:
        model: the module; on a replica its own copy.
        clock: known once the rows are counted.
    """

    def __init__(self, model: nn.Module, clock: Clock | None = None) -> None:
        self._model = model
        self._clock = clock
        self._latest: tuple[Any, Any] = (None, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": (None, None)}

    def __call__(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """A fresh optimizer; its parameters are the module's."""
        del parameters
        self._latest = self._configured()
        optimizer: torch.optim.Optimizer = self._latest[0]
        return optimizer

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """The learning-rate scheduler that was configured with `optimizer`; its step() is due once a local step."""
        made, scheduler = self._latest
        assert made is optimizer
        return scheduler

    def brings_scheduler(self) -> bool:
        """Whether configure_optimizers gives a scheduler too.

        Raises:
            ConfigError: what it returns cannot be used here.
        """
        return self._configured()[1] is not None

    def _configured(self) -> tuple[Any, Any]:
        name = f"{type(self._model).__name__}.configure_optimizers"
        with attached(self._model, ReplicaTrainer(name, self._clock), ModuleLog()):
            given = self._model.configure_optimizers()  # type: ignore[operator]
        optimizers, schedulers = _parts(given)
        if len(optimizers) != 1 or not isinstance(optimizers[0], torch.optim.Optimizer):
            raise ConfigError(
                f"{name} gave {len(optimizers)} optimizers ({', '.join(type(o).__name__ for o in optimizers) or 'none'}); a "
                f"replica has one torch.optim.Optimizer. {WAY_OUT}"
            )
        optimizer = optimizers[0]
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(f"{name} gave LBFGS, whose step needs a closure; a replica calls step(). {WAY_OUT}")
        own = {id(parameter) for parameter in self._model.parameters()}
        if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
            raise ConfigError(
                f"{name} gave an optimizer of parameters that are not the module's: only the module's are averaged. {WAY_OUT}"
            )
        if len(schedulers) > 1:
            raise ConfigError(
                f"{name} gave {len(schedulers)} schedulers; chain them with SequentialLR or ChainedScheduler."
            )
        return optimizer, self._clocked(name, schedulers[0]) if schedulers else None

    def _clocked(self, name: str, given: Any) -> Any:
        settings = dict(given) if isinstance(given, Mapping) else {"scheduler": given}
        scheduler = settings.pop("scheduler", None)
        interval, frequency = settings.pop("interval", "epoch"), settings.pop("frequency", 1)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or settings.get("monitor"):
            raise ConfigError(
                f"{name} gave {type(scheduler).__name__}, which follows a score; a replica's clock is its steps. Use a "
                "schedule of steps or epochs, such as CosineAnnealingLR."
            )
        unknown = settings.keys() - {"name", "strict", "monitor", "reduce_on_plateau"}
        if unknown or interval not in ("step", "epoch") or not isinstance(frequency, int) or frequency < 1:
            raise ConfigError(
                f"{name} gave a scheduler with interval={interval!r}, frequency={frequency!r} and {sorted(unknown)}: interval "
                "is 'step' or 'epoch', frequency 1 or more, and the rest is not known here."
            )
        if not hasattr(scheduler, "step"):
            raise ConfigError(f"{name} gave {type(scheduler).__name__} as scheduler; give a torch.optim.lr_scheduler.")
        steps = 1 if interval == "step" or self._clock is None else max(1, self._clock.steps_per_epoch)
        return _Every(scheduler, frequency * steps)


@final
class _Every:
    """A scheduler that takes one step for several of the replica's."""

    def __init__(self, scheduler: Any, every: int) -> None:
        self._scheduler = scheduler
        self._every = every
        self._steps = 0

    def step(self) -> None:
        self._steps += 1
        if self._steps % self._every == 0:
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "scheduler": self._scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps = state["steps"]
        self._scheduler.load_state_dict(state["scheduler"])


def _parts(given: Any) -> tuple[list[Any], list[Any]]:
    """Optimizers and schedulers of every form that configure_optimizers may return."""
    if given is None:
        return [], []
    if isinstance(given, Mapping):
        scheduler = given.get("lr_scheduler")
        return [given.get("optimizer")], [] if scheduler is None else [scheduler]
    if not isinstance(given, list | tuple):
        return [given], []
    if len(given) == 2 and isinstance(given[0], list | tuple):
        schedulers = given[1]
        return list(given[0]), list(schedulers) if isinstance(schedulers, list | tuple) else [schedulers]
    pairs = [_parts(one) for one in given]
    return [o for optimizers, _ in pairs for o in optimizers], [s for _, schedulers in pairs for s in schedulers]
