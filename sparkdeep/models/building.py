"""Models of other origin, and what they bring along: transformers' own loss, Lightning's step and optimizer, Keras layers.

None of these packages is imported here: a model's class tells what it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor, nn

from sparkdeep.data.batches import Batch
from sparkdeep.errors import ConfigError
from sparkdeep.models.generators import forked
from sparkdeep.models.keras import KerasNetwork, is_keras
from sparkdeep.models.lightning_module import Clock, LightningStep, is_lightning
from sparkdeep.models.lightning_optimizer import LightningOptimizer
from sparkdeep.models.program import Program

__all__ = ["OwnLoss", "adopt", "build_model", "may_bring_loss", "may_bring_optimizer", "own_parts", "ready"]

_NO_LOSS = "give loss=, such as nn.CrossEntropyLoss(), or training_step=."
_NO_OPTIMIZER = "give optimizer=, such as partial(torch.optim.SGD, lr=0.1)."


@final
@dataclass(frozen=True)
class OwnLoss:
    """A training step with the loss that the model computes itself, as transformers' models do for `labels`."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """`model(**features, labels=label).loss`; named labels go by their names."""
        features, labels = batch.features, batch.labels
        named: dict[str, Any] = {} if labels is None else labels if isinstance(labels, dict) else {"labels": labels}
        output = model(**features, **named) if isinstance(features, dict) else model(features, **named)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise ConfigError(
                f"{type(model).__name__} computed no loss of its own from labels {sorted(named)}: its output has "
                f"{_fields(output)}. Name the labels as forward() does with label_cols={{'labels': 'label'}}, or give loss=."
            )
        return loss


def adopt(module: Any) -> Any:
    """The module to train, from what the user gave: a Keras model in its wrapper, anything else as it is.

    Raises:
        ConfigError: a Keras model that cannot be trained here, or a Keras layer inside a torch module.
    """
    if is_keras(module):
        return KerasNetwork.of(module)
    if isinstance(module, nn.Module) and not isinstance(module, KerasNetwork):
        layer = next(((name, part) for name, part in module.named_modules() if is_keras(part)), None)
        if layer is not None:
            raise ConfigError(
                f"{layer[0]} is a Keras layer ({type(layer[1]).__name__}) inside a torch module: its variables change "
                "their names with every copy. Build the whole network in Keras, or that layer from torch.nn."
            )
    return module


def may_bring_loss(model: Any) -> bool:
    """Whether a model as the user gave it has a loss of its own; True also where only building it can tell."""
    return _unbuilt(model) or is_lightning(model) or _takes_labels(model)


def may_bring_optimizer(model: Any) -> bool:
    """Like `may_bring_loss`, for an optimizer."""
    return _unbuilt(model) or is_lightning(model)


def own_parts(
    module: nn.Module,
    *,
    loss: Callable[..., Any] | None,
    training_step: Callable[..., Any] | None,
    optimizer: Callable[..., Any] | None,
    weighted: bool,
) -> tuple[Callable[..., Any] | None, Callable[..., Any]]:
    """(training_step, optimizer) for a built module: those that were given, else those that the module brings along.

    Raises:
        ConfigError: one was not given and the module has none, or has one that cannot be used here.
    """
    if loss is None and training_step is None:
        if is_lightning(module):
            training_step = LightningStep.of(module)
        elif not _takes_labels(module):
            raise ConfigError(_NO_LOSS)
        elif weighted:
            raise ConfigError(
                f"weight_col with the loss that {type(module).__name__} computes itself: it is a mean over all rows alike. "
                "Give loss=nn.CrossEntropyLoss() (it is handed the output's logits), or training_step(model, batch) "
                "with batch.weights."
            )
        else:
            training_step = OwnLoss()
    if optimizer is None:
        if not is_lightning(module):
            raise ConfigError(_NO_OPTIMIZER)
        optimizer = LightningOptimizer(module)
    return training_step, optimizer


def ready(program: Program, *, epochs: int, steps_per_epoch: int, batches_per_step: int) -> Program:
    """The program once its rows are counted: Lightning's step, optimizer and scheduler are given the clock.

    Raises:
        ConfigError: what `configure_optimizers` returns cannot be used here.
    """
    clock = Clock(
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        batches_per_step=batches_per_step,
    )
    if isinstance(program.training_step, LightningStep):
        program = replace(program, training_step=replace(program.training_step, clock=clock))
    if isinstance(program.optimizer, LightningOptimizer):
        optimizer = LightningOptimizer(program.model, clock)
        own = optimizer.brings_scheduler()
        if own and program.lr_scheduler is not None:
            raise ConfigError(
                f"lr_scheduler= and {type(program.model).__name__}.configure_optimizers both give a learning-rate scheduler: "
                "keep one."
            )
        program = replace(
            program, optimizer=optimizer, lr_scheduler=optimizer.scheduler if own else program.lr_scheduler
        )
    return program


def _unbuilt(model: Any) -> bool:
    return not isinstance(model, nn.Module) and not (isinstance(model, type) and issubclass(model, nn.Module))


def _takes_labels(model: Any) -> bool:
    forward = getattr(model, "forward", None)
    if forward is None:
        return False
    try:
        return "labels" in inspect.signature(forward).parameters
    except (TypeError, ValueError):  # a forward without a signature names no argument
        return False


def _fields(output: Any) -> str:
    return str(list(output)) if isinstance(output, Mapping) else type(output).__name__


def build_model(factory: nn.Module | Callable[..., Any], arguments: Mapping[str, Any], seed: int) -> nn.Module:
    """The given module itself, or what the factory makes on the CPU after `manual_seed(seed)`.

    Raises:
        ConfigError: the factory gives no module, or a module is given with arguments.
    """
    factory = adopt(factory)
    if isinstance(factory, nn.Module):
        if arguments:
            raise ConfigError(
                f"model_args={dict(arguments)!r} with a model that is built already; give the class instead."
            )
        return factory
    with forked(seed):
        module = adopt(factory(**arguments))
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"model={factory!r} returned {type(module).__name__}; it must be an nn.Module, a class of one, a callable that "
            "returns one, or 'package.module:function'."
        )
    return module.cpu()
