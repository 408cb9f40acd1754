"""The first rows through model and loss, on the driver, before anything trains: shapes and dtypes, in plain words."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparkdeep.data.batches import Batch, make_batch
from sparkdeep.data.schema import Schema
from sparkdeep.errors import ConfigError, SparkdeepError, UserCodeError
from sparkdeep.models.building import build_model
from sparkdeep.models.denominators import BatchLoss
from sparkdeep.models.generators import forked
from sparkdeep.models.losses import BroadcastWatch, LossFunction, forward
from sparkdeep.models.modes import Modes
from sparkdeep.models.packing import check_trained, copied
from sparkdeep.models.program import NO_STEPS, Program, inner_optimizer, prepared
from sparkdeep.models.validation import check_metrics, described, try_metric
from sparkdeep.tensors.parameters import float_dtype_of, named_tensors

__all__ = ["build_model", "float_dtype_of", "materialize", "rehearse", "sample_batch"]

_LOG = logging.getLogger("sparkdeep")


def sample_batch(fields: Mapping[str, Any], schema: Schema, program: Program) -> Batch:
    """A few ingested rows as the model will see them, after a copy of `preprocess` in eval mode."""
    dtype = float_dtype_of(program.model)
    own = copied(Program(model=nn.Identity(), loss=None, optimizer=NO_STEPS, preprocess=program.preprocess))
    Modes(own).eval()
    return prepared(make_batch(fields, schema, float_dtype=dtype, collate=program.collate), own, augment=False)


def materialize(module: nn.Module, batch: Batch, seed: int) -> None:
    """Give lazy parameters (`nn.LazyLinear` and its kin) their shapes, by one forward pass.

    Raises:
        ConfigError: the rows do not fit, or a lazy parameter is not reached by `forward`.
        UserCodeError: the user's `forward` raised; its traceback comes first.
    """
    if not _lazy(module):
        return
    training = module.training
    with forked(seed), torch.no_grad():
        module.eval()
        try:
            forward(module, batch.features)
        except Exception as error:
            raise _forward_error(error, batch, "the first ingested rows") from error
    module.train(training)
    if names := _lazy(module):
        raise ConfigError(
            f"lazy parameter {names[0]!r} has no shape yet, as forward() on the first ingested rows did not reach it. Give "
            "the layer its input size, or remove it."
        )


def _lazy(module: nn.Module) -> list[str]:
    return [name for name, tensor in named_tensors(module) if is_lazy(tensor)]


def rehearse(program: Program, batch: Batch, schema: Schema) -> Any:
    """One batch through a copy of the model, the loss and the metrics, and one step of optimizer and learning rate.

    Returns the model's output, without a gradient.

    Raises:
        ConfigError: shapes or dtypes do not fit; the message gives them and the remedy.
        UserCodeError: the user's code raised; its traceback comes first.
    """
    check_metrics(program.metrics or {})
    check_trained(program)
    program = copied(program)
    model = program.model.eval()
    loss_function = LossFunction(program, weighted=any(f.role == "weight" for f in schema.fields))
    with forked():
        output: Any = None
        try:
            output = forward(model, batch.features)
        except Exception as error:
            if program.training_step is None:
                raise _forward_error(error, batch, "the first ingested rows") from error
        _rehearse_loss(program, loss_function, model, output, batch)
        with torch.no_grad():
            if output is not None:
                output = forward(model, batch.features)  # as transform will see it, with the user's own type
            _rehearse_one_row(program, model, output, batch)
            for name, metric in (program.metrics or {}).items():
                try_metric(name, metric, output, batch.labels)
        _rehearse_optimizer(program)
    return output


def _rehearse_loss(program: Program, loss_function: LossFunction, model: nn.Module, output: Any, batch: Batch) -> None:
    produced = _shapes(batch) if output is None else f"output {described(output)}, {_shapes(batch)}"
    try:
        plain = program.training_step is None
        loss = (_watched_loss(loss_function, output, batch, produced) if plain else loss_function(model, batch)).mean
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
            # Some losses accept labels of a wrong dtype, and only computing their gradient fails.
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    except SparkdeepError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the loss cannot take this model's output and these labels: {type(error).__name__}: {error}. It was "
            f"given {produced}. {_label_remedy(batch)}\n{traceback.format_exc()}"
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ConfigError(
            f"the loss must be one number a batch (reduction='mean'), got {described(loss)} from {produced}."
        )
    if not loss.requires_grad:
        raise ConfigError(f"the loss does not depend on any trainable parameter; it was given {produced}.")
    loss_function.check_weights(output, batch)
    if loss_function.mixed:
        _LOG.warning(
            "the loss has parts that torch divides by different counts (labels that are not ignored, their classes' weights): batches "
            "and replicas weigh by their rows in it. For another mean return (sum, count) from the loss or training_step."
        )


def _watched_loss(loss_function: LossFunction, output: Any, batch: Batch, produced: str) -> BatchLoss:
    watch = BroadcastWatch(batch.rows, batch.labels)
    with warnings.catch_warnings(record=True) as caught, watch:
        warnings.simplefilter("always")
        loss = loss_function.of_output(output, batch)
    if watch.found or any("target size" in str(w.message) for w in caught):
        raise ConfigError(
            f"the loss would broadcast, and train on something else than you mean: {produced}. Make the shapes equal: "
            "label_cols=['name'] gives labels of shape (B, 1), label_cols='name' gives (B,)."
        )
    return loss


def _rehearse_one_row(program: Program, model: nn.Module, output: Any, batch: Batch) -> None:
    """A batch of one row must keep its row dimension: the last batch of validation and of `transform` may be one."""
    rows = batch.rows
    if rows == 1 or not isinstance(output, Tensor) or output.shape[:1] != (rows,):
        return
    features = batch.features
    parts = features.values() if isinstance(features, dict) else [features]
    if not all(isinstance(part, Tensor) and part.shape[:1] == (rows,) for part in parts):
        return
    first = {k: v[:1] for k, v in features.items()} if isinstance(features, dict) else features[:1]
    try:
        one = forward(model, first)
    except Exception as error:
        if program.training_step is not None:
            return  # its model need not define a forward pass
        raise _forward_error(error, batch, "a batch of one row, the first of the ingested ones") from error
    if not isinstance(one, Tensor) or one.dim() != output.dim() or len(one) != 1:
        raise ConfigError(
            f"the model's output for one row is {described(one)}, for {rows} rows {described(output)}: the dimension of rows "
            "is gone, as .squeeze() does to a batch of one. Name the dimension: .squeeze(-1)."
        )


def _rehearse_optimizer(program: Program) -> None:
    try:
        _, scheduler = inner_optimizer(program)
        if scheduler is not None:
            scheduler.step()
            scheduler.state_dict()
    except SparkdeepError:
        raise
    except Exception as error:
        raise ConfigError(
            f"optimizer= or lr_scheduler= cannot be used: {type(error).__name__}: {error}. optimizer is called with the list "
            "of trainable parameters, lr_scheduler with the optimizer, and its step() with nothing, once a local step: "
            "optimizer=partial(torch.optim.AdamW, lr=1e-3), lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, "
            f"step_size=100).\n{traceback.format_exc()}"
        ) from error


def _forward_error(error: Exception, batch: Batch, where: str) -> Exception:
    shapes = _shapes(batch)
    tensors = list(batch.features.values()) if isinstance(batch.features, dict) else [batch.features]
    whole = any(isinstance(t, Tensor) and not t.is_floating_point() for t in tensors)
    if whole and "dtype" in str(error):
        return ConfigError(
            f"the model cannot take integer features: {error}. It was given {shapes}. Integers stay integers (an embedding "
            "needs them); cast the column in Spark (col.cast('array<float>')) or convert in preprocess=lambda x: x.float()."
        )
    text = "".join(traceback.format_exception(error))
    return UserCodeError(
        f"{text.rstrip()}\n\nthe model raised {type(error).__name__} on {where}: {shapes}.",
        traceback_text=text,
    )


def _label_remedy(batch: Batch) -> str:
    labels = batch.labels
    if labels is None:
        return "No label_cols was given: name one, or use training_step= for a loss that needs none."
    if isinstance(labels, Tensor) and labels.is_floating_point():
        return "A loss over classes needs integer labels: cast the column in Spark, col('label').cast('long')."
    return "A loss over numbers needs floating-point labels: cast the column in Spark, col('label').cast('float')."


def _shapes(batch: Batch) -> str:
    return f"features {described(batch.features)}, labels {described(batch.labels)}"
