"""The program and the schema of a fit, from its settings; rehearsed on the driver with the first rows."""

from __future__ import annotations

import math
from typing import Any

from pyspark.sql import DataFrame
from torch import nn

from sparkdeep.data.order import steps_per_epoch
from sparkdeep.data.schema import Schema, build_schema, names_in
from sparkdeep.errors import ConfigError
from sparkdeep.models.building import own_parts, ready
from sparkdeep.models.packing import copied
from sparkdeep.models.prediction import Prediction, scores_for
from sparkdeep.models.program import NO_STEPS, Program
from sparkdeep.models.registry import import_factory
from sparkdeep.models.rehearsal import build_model, float_dtype_of, materialize, rehearse, sample_batch
from sparkdeep.models.scored_rows import check_room
from sparkdeep.models.validation import has_functions
from sparkdeep.spark.fit.settings import FitSettings
from sparkdeep.spark.ingest.ingest import Ingested
from sparkdeep.spark.model.columns import VECTORS
from sparkdeep.spark.model.model import TorchModel
from sparkdeep.spark.session.types import column_types

__all__ = ["columns_read", "program_of", "rehearsed", "schema_for", "validation_of"]


def columns_read(settings: FitSettings) -> list[str]:
    """Names of the columns that a fit reads."""
    used = names_in(settings.feature_cols) + names_in(settings.label_cols) + names_in(settings.weight_col)
    return [*used, settings.validation] if isinstance(settings.validation, str) else used


def validation_of(settings: FitSettings) -> float | str | DataFrame | None:
    """`validation` as a fraction, the name of a column, a DataFrame, or None."""
    value = settings.validation
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def program_of(settings: FitSettings, warm_start: TorchModel | None) -> Program:
    """The user's objects, with the module as it starts.

    Raises:
        ConfigError: the module cannot be made, or does not fit `warm_start`.
    """
    if settings.validation is not None and isinstance(settings.validation, float) and math.isnan(settings.validation):
        raise ConfigError("validation=nan: give a fraction between 0 and 1.")
    factory = import_factory(settings.model) if isinstance(settings.model, str) else settings.model
    module = build_model(factory, settings.model_args, settings.local.seed)
    training_step, optimizer = own_parts(
        module,
        loss=settings.loss,
        training_step=settings.training_step,
        optimizer=settings.optimizer if settings.run.work == "local" else NO_STEPS,
        weighted=settings.weight_col is not None,
    )
    given = Program(
        model=module,
        loss=settings.loss,
        optimizer=optimizer,
        lr_scheduler=settings.lr_scheduler,
        training_step=training_step,
        preprocess=settings.preprocess,
        augment=settings.augment,
        collate=settings.collate,
        buffers=settings.buffers,
        metrics=settings.metrics,
    )
    program = copied(given)  # the user's own objects are left as they are
    if warm_start is not None:
        _warm(program.model, warm_start.model)
    return program


def schema_for(settings: FitSettings, dataset: DataFrame, program: Program) -> Schema:
    """What is known about the columns before any row was seen.

    Raises:
        DataError: a column is missing, or of a type that cannot be trained on.
    """
    used = names_in(settings.feature_cols) + names_in(settings.label_cols) + names_in(settings.weight_col)
    wide = str(float_dtype_of(program.model)) == "torch.float64"
    return build_schema(
        types=column_types(dataset.schema, used),
        feature_cols=settings.feature_cols,
        label_cols=settings.label_cols,
        weight_col=settings.weight_col,
        float_dtype="float64" if wide else "float32",
        decode=settings.decode,
        collate=settings.collate,
    )


def rehearsed(settings: FitSettings, program: Program, ingested: Ingested) -> tuple[Program, Prediction]:
    """Send the first rows through model and loss on the driver; returns the finished program and what `transform` writes.

    Raises:
        UserCodeError, ConfigError, DataError: what would have failed on every replica.
    """
    batch = sample_batch(ingested.sample, ingested.schema, program)
    materialize(program.model, batch, settings.local.seed)
    local = settings.local
    rows = max(shard.rows["train"] for shard in ingested.facts)
    program = ready(
        program,
        epochs=settings.run.epochs,
        steps_per_epoch=steps_per_epoch(rows, batch_size=local.batch_size, accumulate_batches=local.accumulate_batches),
        batches_per_step=local.accumulate_batches,
    )
    output = rehearse(program, batch, ingested.schema)
    validated = max(shard.rows["validation"] for shard in ingested.facts)
    if validated and has_functions(program.metrics or {}):
        check_room(output, batch.labels, batch.rows, validated)
    return program, _prediction(settings, program, output, batch.rows)


def _prediction(settings: FitSettings, program: Program, output: Any, rows: int) -> Prediction:
    """What `transform` will write; a training_step's model need not have an output that can be written."""
    choice = settings.prediction
    vectors = [part for part in VECTORS if getattr(settings, f"{part}_col") is not None]
    try:
        return Prediction.of(choice, output, rows=rows, vectors=vectors, scores=scores_for(program.loss))
    except ConfigError:
        if program.training_step is None or choice is not None or vectors:
            raise
        return Prediction(choice=None, sql_type="")  # `transform` refuses it, with what to do


def _warm(module: nn.Module, source: nn.Module) -> None:
    try:
        module.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"warm_start: the model's parameters do not fit this estimator's: {error}. Use the same model and model_args."
        ) from error
