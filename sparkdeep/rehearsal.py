"""The first rows through model and loss, on the driver, before anything trains: shapes and dtypes, in plain words."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from sparkdeep.data.batches import Batch, make_batch
from sparkdeep.data.schema import Schema
from sparkdeep.errors import ConfigError, UserCodeError
from sparkdeep.inputs import prepared
from sparkdeep.losses import LossFunction, forward
from sparkdeep.parameters import float_dtype_of
from sparkdeep.program import Program, pack_program
from sparkdeep.validation import check_metrics, is_torchmetric

__all__ = ["build_model", "float_dtype_of", "materialize", "rehearse", "sample_batch"]


def build_model(factory: nn.Module | Callable[..., Any], arguments: Mapping[str, Any], seed: int) -> nn.Module:
    """A module of our own on the CPU: a copy of the given one, or what the factory makes after `manual_seed(seed)`.

    Raises:
        ConfigError: the factory gives no module, or the module holds what cannot be copied and sent.
    """
    if isinstance(factory, nn.Module):
        if arguments:
            raise ConfigError(
                f"model_args={dict(arguments)!r} with a model that is built already; give the class instead."
            )
        try:
            return copy.deepcopy(factory).cpu()
        except Exception:
            pack_program(Program(model=factory, loss=None, optimizer=torch.optim.SGD))  # names the attribute
            raise
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = factory(**arguments)
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"model={factory!r} returned {type(module).__name__}; it must be an nn.Module, a class of one, a callable that "
            "returns one, or 'package.module:function'."
        )
    return module.cpu()


def sample_batch(fields: Mapping[str, Any], schema: Schema, program: Program) -> Batch:
    """A few ingested rows as the model gets them, `preprocess` included."""
    dtype = float_dtype_of(program.model)
    return prepared(make_batch(fields, schema, float_dtype=dtype, collate=program.collate), program, augment=False)


def materialize(module: nn.Module, batch: Batch, seed: int) -> None:
    """Give lazy parameters (`nn.LazyLinear` and its kin) their shapes, by one forward pass."""
    if any(is_lazy(t) for t in [*module.parameters(), *module.buffers()]):
        training = module.training
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            module.eval()
            forward(module, batch.features)
        module.train(training)


def rehearse(program: Program, batch: Batch, schema: Schema) -> Any:
    """One batch through a copy of the model, the loss and the metrics; returns the model's output, detached.

    Raises:
        ConfigError: shapes or dtypes do not fit; the message gives them and the remedy.
        UserCodeError: the user's code raised; its traceback comes first.
    """
    check_metrics(program.metrics or {})
    model = copy.deepcopy(program.model).eval()
    shapes = f"features {_describe(batch.features)}, labels {_describe(batch.labels)}"
    loss_function = LossFunction(program, weighted=any(f.role == "weight" for f in schema.fields))
    with torch.random.fork_rng(devices=[]):
        output: Any = None
        try:
            output = forward(model, batch.features)
        except Exception as error:
            if program.training_step is None:
                raise _forward_error(error, batch, shapes) from error
        _rehearse_loss(program, loss_function, model, output, batch, shapes)
        with torch.no_grad():
            for name, metric in (program.metrics or {}).items():
                _rehearse_metric(name, metric, output, batch)
    return _detached(output)


def _rehearse_loss(
    program: Program, loss_function: LossFunction, model: nn.Module, output: Any, batch: Batch, shapes: str
) -> None:
    produced = shapes if output is None else f"output {_describe(output)}, {shapes}"
    watch = _BroadcastWatch(batch.rows)
    with warnings.catch_warnings(record=True) as caught, watch:
        warnings.simplefilter("always")
        try:
            if program.training_step is None:
                loss = loss_function.of_output(output, batch)
            else:
                loss = loss_function(model, batch)
            if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
                # Some losses take labels of a wrong dtype, and only their gradient refuses them.
                trainable = [p for p in model.parameters() if p.requires_grad]
                torch.autograd.grad(loss, trainable, allow_unused=True)
        except Exception as error:
            remedy = _label_remedy(batch)
            raise ConfigError(
                f"the loss cannot take this model's output and these labels: {type(error).__name__}: {error}. It was "
                f"given {produced}. {remedy}\n{traceback.format_exc()}"
            ) from error
    if watch.found or any("target size" in str(w.message) for w in caught):
        raise ConfigError(
            f"the loss would broadcast, and train on something else than you mean: {produced}. Make the shapes equal: "
            "label_cols=['name'] gives labels of shape (B, 1), label_cols='name' gives (B,)."
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ConfigError(
            f"the loss must be one number a batch (reduction='mean'), got {_describe(loss)} from {produced}."
        )
    if not loss.requires_grad:
        raise ConfigError(f"the loss does not depend on any trainable parameter; it was given {produced}.")
    loss_function.check_weights(output, batch)


class _BroadcastWatch(TorchFunctionMode):
    """Notices when (rows, 1) meets (rows,): an elementwise operation makes (rows, rows) of them, and says nothing."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows
        self.found = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, and look at what came of which shapes."""
        del types
        result = func(*args, **(kwargs or {}))
        if self._rows > 1 and isinstance(result, Tensor) and result.shape == (self._rows, self._rows):
            shapes = {tuple(value.shape) for value in args if isinstance(value, Tensor)}
            self.found = self.found or {(self._rows, 1), (self._rows,)} <= shapes
        return result


def _rehearse_metric(name: str, metric: Any, output: Any, batch: Batch) -> None:
    try:
        if is_torchmetric(metric):
            # The first rows may lack a class, so that there may be no score of them yet.
            copy.deepcopy(metric).update(output, batch.labels)
        else:
            float(metric(output, batch.labels))
    except Exception as error:
        raise UserCodeError(
            f"{traceback.format_exc().rstrip()}\n\nmetric {name!r} raised {type(error).__name__}: {error} for output "
            f"{_describe(output)} and labels {_describe(batch.labels)}; it must return one number.",
            traceback_text=traceback.format_exc(),
        ) from error


def _forward_error(error: Exception, batch: Batch, shapes: str) -> Exception:
    tensors = list(batch.features.values()) if isinstance(batch.features, dict) else [batch.features]
    whole = any(isinstance(t, Tensor) and not t.is_floating_point() for t in tensors)
    if whole and "dtype" in str(error):
        return ConfigError(
            f"the model cannot take integer features: {error}. It was given {shapes}. Integers stay integers (an embedding "
            "needs them); cast the column in Spark (col.cast('array<float>')) or convert in preprocess=lambda x: x.float()."
        )
    text = "".join(traceback.format_exception(error))
    return UserCodeError(
        f"{text.rstrip()}\n\nthe model raised {type(error).__name__} on the first ingested rows: {shapes}.",
        traceback_text=text,
    )


def _label_remedy(batch: Batch) -> str:
    labels = batch.labels
    if labels is None:
        return "No label_cols was given: name one, or use training_step= for a loss that needs none."
    if isinstance(labels, Tensor) and labels.is_floating_point():
        return "A loss over classes needs integer labels: cast the column in Spark, col('label').cast('long')."
    return "A loss over numbers needs floating-point labels: cast the column in Spark, col('label').cast('float')."


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_describe, value)) + ")"
    return type(value).__name__


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {k: _detached(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_detached, value))
    return value
