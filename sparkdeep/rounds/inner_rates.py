"""The learning rate of the replicas' local steps, as the driver needs it: for outer steps and for schedules."""

from __future__ import annotations

import math
from typing import Any, final

from sparkdeep.errors import ConfigError
from sparkdeep.models.program import Program, inner_optimizer

__all__ = ["InnerRates"]


@final
class InnerRates:
    """The rates of the parameter groups, from the program's own optimizer and scheduler, stepped on the driver.

    Nothing is made before it is asked for, as models that bring their own optimizer may take long to make it.

    Args:
        program: of the fit; its model's parameters are not touched.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._rates: list[list[float]] = []
        """Of every group, by local steps."""
        self._highest: list[float] = []

    def at(self, step: int) -> float:
        """The highest of the groups' rates after this many local steps: a schedule needs one number.

        Raises:
            ConfigError: the optimizer has no learning rate.
        """
        return max(self._groups(step))

    def _groups(self, step: int) -> list[float]:
        self._reach(step)
        return self._rates[min(step, len(self._rates) - 1)]

    def highest(self, step: int) -> float:
        """The highest rate until then."""
        self._reach(step)
        return self._highest[min(step, len(self._highest) - 1)]

    @property
    def constant(self) -> bool:
        """Whether nothing changes the rate."""
        self._reach(0)
        return self._scheduler is None

    def mean(self, first: int, steps: int) -> list[float]:
        """The mean of the rates of so many steps from the `first` on, one a trainable parameter; of none, that of the first.

        A parameter that the optimizer was not given has a rate of 0.
        """
        count = max(1, steps)
        by_group = zip(*map(self._groups, range(first, first + count)), strict=True)
        means = [math.fsum(rates) / count for rates in by_group]
        return [0.0 if group is None else means[group] for group in self._group_of]

    def _reach(self, step: int) -> None:
        if not self._rates:
            parameters = [p for p in self._program.model.parameters() if p.requires_grad]
            self._optimizer, self._scheduler = inner_optimizer(self._program)
            groups = {id(p): i for i, group in enumerate(self._optimizer.param_groups) for p in group["params"]}
            self._group_of = [groups.get(id(parameter)) for parameter in parameters]
            self._add()
        while self._scheduler is not None and len(self._rates) <= step:
            self._scheduler.step()
            self._add()

    def _add(self) -> None:
        rates: list[Any] = [group.get("lr") for group in self._optimizer.param_groups]
        for rate in rates:
            if rate is None or not math.isfinite(float(rate)):
                raise ConfigError(
                    f"optimizer {type(self._optimizer).__name__} tells the learning rate {rate!r}; the schedule or the outer "
                    "optimizer needs the replicas': give an optimizer with lr=."
                )
        self._rates.append([float(rate) for rate in rates])
        self._highest.append(max(*self._rates[-1], self._highest[-1] if self._highest else -math.inf))
