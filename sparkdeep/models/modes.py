"""Train and eval mode of all modules of a program, as its user set them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from sparkdeep.models.program import Program, other_modules

__all__ = ["Modes"]


@final
class Modes:
    """Sets the modes of a program's modules.

    In training a part that the user put in eval mode stays so (a BatchNorm whose statistics are to stay), unless the whole model
    came in eval mode, as pretrained ones do. The modules of `preprocess`, the loss and the like are as they came.

    Args:
        program: as the user gave it.
    """

    def __init__(self, program: Program) -> None:
        self._model = program.model
        self._kept = [part for part in program.model.modules() if not part.training] if program.model.training else []
        others = [module for where, module in other_modules(program).items() if not where.startswith("metrics")]
        self._others = [(part, part.training) for module in others for part in module.modules()]

    def train(self) -> None:
        """As training needs them."""
        self._model.train()
        for part in self._kept:
            part.training = False
        for part, mode in self._others:
            part.training = mode

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """For a block: as scoring needs them, and afterwards as they were."""
        before = [(part, part.training) for part in [*self._model.modules(), *(part for part, _ in self._others)]]
        self.eval()
        try:
            yield
        finally:
            for part, mode in before:
                part.training = mode

    def eval(self) -> None:
        """As scoring needs them: one row's value does not depend on the rows beside it."""
        self._model.eval()
        for part, _ in self._others:
            part.training = False
