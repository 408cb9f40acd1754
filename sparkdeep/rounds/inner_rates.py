"""The learning rate of the replicas' local steps, as the driver needs it: for outer steps and for schedules."""

from __future__ import annotations

import math
from typing import final

from torch import nn

from sparkdeep.errors import ConfigError
from sparkdeep.models.program import Program, inner_optimizer

__all__ = ["InnerRates"]


@final
class InnerRates:
    """The rate of the first parameter group, from the program's own optimizer and scheduler, stepped on the driver.

    Nothing is made before it is asked for, as models that bring their own optimizer may take long to make it.

    Args:
        program: of the fit; its model's parameters are not touched.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._rates: list[float] = []
        self._highest: list[float] = []

    def at(self, step: int) -> float:
        """The rate after this many local steps.

        Raises:
            ConfigError: the optimizer has no learning rate.
        """
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

    def mean(self, first: int, steps: int) -> float:
        """The mean of the rates of so many steps from the `first` on; of none, that of the first."""
        count = max(1, steps)
        return math.fsum(self.at(step) for step in range(first, first + count)) / count

    def _reach(self, step: int) -> None:
        if not self._rates:
            parameters = [nn.Parameter(p.detach()) for p in self._program.model.parameters() if p.requires_grad]
            self._optimizer, self._scheduler = inner_optimizer(self._program, parameters)
            self._add()
        while self._scheduler is not None and len(self._rates) <= step:
            self._scheduler.step()
            self._add()

    def _add(self) -> None:
        rate = self._optimizer.param_groups[0].get("lr")
        if rate is None or not math.isfinite(float(rate)):
            raise ConfigError(
                f"optimizer {type(self._optimizer).__name__} tells the learning rate {rate!r}; the schedule or the outer optimizer "
                "needs the replicas': give an optimizer with lr=."
            )
        self._rates.append(float(rate))
        self._highest.append(max(float(rate), self._highest[-1] if self._highest else -math.inf))
