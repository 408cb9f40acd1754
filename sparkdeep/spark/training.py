"""The steps of a fit on Spark: ingest, rehearsal, rounds, the model; cleaned up after, whatever happened."""

from __future__ import annotations

import contextlib
import logging
import math
from dataclasses import replace
from typing import Any, Final

from pyspark.sql import DataFrame, SparkSession
from torch import nn

from sparkdeep.callbacks import Callbacks, FitInfo
from sparkdeep.checkpoint import CheckpointDirectory
from sparkdeep.config import RunSettings
from sparkdeep.data.schema import Schema, build_schema, names_in
from sparkdeep.errors import ConfigError, ReplicaLostError
from sparkdeep.fitting import Fit, new_run_id, plan_of
from sparkdeep.interop import own_parts, ready
from sparkdeep.metrics import summary
from sparkdeep.prediction import Prediction
from sparkdeep.program import Program, pack_program
from sparkdeep.progress import Progress
from sparkdeep.registry import import_factory, reference_of
from sparkdeep.rehearsal import build_model, float_dtype_of, materialize, rehearse, sample_batch
from sparkdeep.spark.barrier import SparkJob, clean_executors
from sparkdeep.spark.checkpoints import checkpoints_of, open_folder
from sparkdeep.spark.ingest import Ingested, dealt, read_manifests, shards_of
from sparkdeep.spark.model import TorchModel
from sparkdeep.spark.model_columns import VECTORS
from sparkdeep.spark.petastorm_source import active_session, source_of
from sparkdeep.spark.preflight import available_slots, check_session, check_slots, task_profile
from sparkdeep.spark.session import access_to
from sparkdeep.spark.settings import FitSettings, described
from sparkdeep.spark.slots import Courtesy, Lease, ledger_of
from sparkdeep.spark.transports import Transport, check_load, chosen, ends_of, guarded, probe, transport_for
from sparkdeep.spark.types import column_types
from sparkdeep.startup import Phases

__all__ = ["train"]

_LOG = logging.getLogger("sparkdeep")
_INGEST_TIMEOUT_S: Final = 24 * 3600.0
_SLOT_TIMEOUT_S: Final = 30.0
_HANDED_ON: Final = ("prediction", "prediction_col", "probability_col", "raw_prediction_col")


def train(settings: FitSettings, dataset: DataFrame, warm_start: TorchModel | None) -> TorchModel:
    """Ingest, rehearse, train round by round, and clean up, also after a failure; see `TorchEstimator.fit`."""
    phases = Phases()
    if (source := source_of(dataset)) is not None:
        dataset = source.dataframe(active_session(), settings.run.num_workers, _columns_read(settings))
        settings = replace(settings, deal="partitions")
    spark = getattr(dataset, "sparkSession", None)
    if spark is None:
        raise ConfigError(
            f"fit was given a {type(dataset).__name__}; it needs a Spark DataFrame: spark.createDataFrame(...)."
        )
    check_session(spark)
    transport = chosen(settings, spark)
    settings = guarded(settings, spark)
    profile = task_profile(spark, settings.cpus_per_worker, settings.gpus_per_worker)
    check_slots(spark, settings.run.num_workers, profile, timeout_s=_SLOT_TIMEOUT_S)
    if warm_start is not None and not isinstance(warm_start, TorchModel):
        raise ConfigError(
            f"warm_start is a {type(warm_start).__name__}; give the TorchModel of an earlier fit or of TorchModel.load. To "
            "start from a module of your own, pass it as model=."
        )
    open_folder(settings, spark)  # a folder that cannot be opened is refused before anything runs
    program = _program(settings, warm_start)
    schema = _schema(settings, dataset, program)
    run = new_run_id()
    rows = dealt(
        dataset,
        schema,
        validation=_validation(settings),
        num_workers=settings.run.num_workers,
        seed=settings.local.seed,
        deal=settings.deal,
    )

    def shards() -> DataFrame:
        return shards_of(rows, schema, run=run, decode=settings.decode, shard_dir=settings.shard_dir, profile=profile)

    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(_slots(settings, spark, run, profile))
        generation = shards()
        phases.end("checks")
        stack.callback(lambda: _clean(settings, spark, run))
        stack.callback(lambda: launcher.close() if launcher else generation.unpersist())
        launcher: Transport | None = None
        if transport == "spark":
            probe(settings, spark, run, profile)
        ingested = _ingest(settings, spark, generation, schema, run, lease)
        phases.end("ingest")
        program, prediction = _rehearse(settings, program, ingested)
        phases.end("rehearsal")
        launcher = transport_for(
            settings,
            spark,
            shards,
            generation=generation,
            plan=plan_of(program, settings.local, ingested.schema),
            run=run,
            profile=profile,
            on_busy=lease.alive,
        )
        progress = stack.enter_context(Progress(enabled=settings.progress))
        checkpoints = checkpoints_of(settings, spark, program, ingested, warm_start)
        fit = _assemble(settings, spark, stack, program, ingested, launcher, run, progress, checkpoints, lease)
        callbacks = Callbacks([phases, *settings.callbacks])
        try:
            callbacks.start(_info(settings, fit, ingested))
            _run_rounds(fit, progress, callbacks, lease, Courtesy(spark) if transport == "socket" else None)
        except BaseException as error:
            callbacks.end(None, error)
            raise
        fit.load_result()
    model = TorchModel(
        module=program.model.eval(),
        schema=ingested.schema,
        written=prediction,
        history=fit.state.records,
        preprocess=settings.preprocess,
        collate=settings.collate,
        decode=settings.decode,
        reference=reference_of(settings.model, settings.model_args),
        batch_size=max(settings.local.batch_size, 256),
        **{name: getattr(settings, name) for name in _HANDED_ON if getattr(settings, name) is not None},
    )
    model.startup = phases.startup
    callbacks.end(model, None)
    return model


def _slots(
    settings: FitSettings, spark: SparkSession, run: str, profile: Any
) -> contextlib.AbstractContextManager[Lease]:
    return ledger_of(access_to(spark).application).hold(
        f"fit {run}",
        settings.run.num_workers,
        lambda: available_slots(spark, profile) or settings.run.num_workers,
        timeout_s=settings.run.open_timeout_s,
    )


def _prediction(settings: FitSettings, program: Program, output: Any, rows: int) -> Prediction:
    """What `transform` will write; a training_step's model need not have an output that can be written."""
    choice = settings.prediction
    vectors = [part for part in VECTORS if getattr(settings, f"{part}_col") is not None]
    try:
        return Prediction.of(choice, output, rows=rows, vectors=vectors)
    except ConfigError:
        if program.training_step is None or choice is not None or vectors:
            raise
        return Prediction(choice=None, sql_type="")  # refused by `transform`, with what to do


def _validation(settings: FitSettings) -> float | str | DataFrame | None:
    value = settings.validation
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _program(settings: FitSettings, warm_start: TorchModel | None) -> Program:
    if settings.validation is not None and isinstance(settings.validation, float) and math.isnan(settings.validation):
        raise ConfigError("validation=nan: give a fraction between 0 and 1.")
    factory = import_factory(settings.model) if isinstance(settings.model, str) else settings.model
    module = build_model(factory, settings.model_args, settings.local.seed)
    if warm_start is not None:
        _warm(module, warm_start.model)
    training_step, optimizer = own_parts(
        module,
        loss=settings.loss,
        training_step=settings.training_step,
        optimizer=settings.optimizer,
        weighted=settings.weight_col is not None,
    )
    return Program(
        model=module,
        loss=settings.loss,
        optimizer=optimizer,
        lr_scheduler=settings.lr_scheduler,
        training_step=training_step,
        preprocess=settings.preprocess,
        augment=settings.augment,
        collate=settings.collate,
        metrics=settings.metrics,
    )


def _columns_read(settings: FitSettings) -> list[str]:
    used = names_in(settings.feature_cols) + names_in(settings.label_cols) + names_in(settings.weight_col)
    return [*used, settings.validation] if isinstance(settings.validation, str) else used


def _schema(settings: FitSettings, dataset: DataFrame, program: Program) -> Schema:
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


def _ingest(
    settings: FitSettings, spark: SparkSession, generation: DataFrame, schema: Schema, run: str, lease: Lease
) -> Ingested:
    for attempt in range(settings.run.max_retries + 1):
        job = SparkJob(spark, generation, tag=f"sparkdeep-{run}-ingest-{attempt}", description="sparkdeep fit: ingest")
        try:
            rows = job.result(
                _INGEST_TIMEOUT_S, "ingest", idle_timeout_s=settings.run.open_timeout_s, on_busy=lease.alive
            )
            return read_manifests(rows, schema, settings.run.num_workers, validated=settings.validation is not None)
        except ReplicaLostError as error:
            if attempt == settings.run.max_retries:
                raise
            _LOG.warning("ingest, attempt %d of %d failed: %s", attempt + 1, settings.run.max_retries + 1, error)
        except BaseException:
            job.cancel()
            raise
    raise AssertionError("unreachable")


def _rehearse(settings: FitSettings, program: Program, ingested: Ingested) -> tuple[Program, Prediction]:
    batch = sample_batch(ingested.sample, ingested.schema, program)
    materialize(program.model, batch, settings.local.seed)
    program = ready(program, settings.local, settings.run.epochs, ingested.facts)
    pack_program(program)  # names what cannot be pickled, which the copy that rehearses would stumble over
    output = rehearse(program, batch, ingested.schema)
    prediction = _prediction(settings, program, output, batch.rows)
    return program, prediction


def _assemble(
    settings: FitSettings,
    spark: SparkSession,
    stack: contextlib.ExitStack,
    program: Program,
    ingested: Ingested,
    launcher: Transport,
    run: str,
    progress: Progress,
    checkpoints: CheckpointDirectory | None,
    lease: Lease,
) -> Fit:
    def beat(replica: int, rows: int) -> None:
        lease.alive()
        progress.beat(replica, rows)

    fit = Fit(
        program=program,
        local=settings.local,
        settings=_staged(settings),
        plan=plan_of(program, settings.local, ingested.schema),
        shards=ingested.facts,
        run=run,
        outer_optimizer=settings.outer_optimizer,
        checkpoints=checkpoints,
        resume=bool(settings.resume),
        on_beat=beat,
        on_log=progress.log,
        **ends_of(launcher, settings, spark, stack),
    )
    check_load(settings, fit)
    if fit.state.committed:
        _LOG.warning(
            "going on with the run in %s after round %d of %d%s",
            described(settings)["checkpoint_dir"],
            fit.state.committed,
            fit.schedule.num_rounds,
            ": it is finished, nothing is trained; resume=False or another checkpoint_dir starts a new one"
            if fit.finished
            else "",
        )
    rows = sum(shard.rows["train"] for shard in ingested.facts)
    _LOG.info(
        "%d training rows on %d replicas, batch %d each (%d together), %d rounds, %.1f MB of parameters",
        rows,
        settings.run.num_workers,
        settings.local.batch_size,
        settings.local.batch_size * settings.run.num_workers,
        fit.schedule.num_rounds,
        fit.layout.num_bytes / 1e6,
    )
    return fit


def _staged(settings: FitSettings) -> RunSettings:
    """The run's settings; a callback that needs the slots after every round leaves each stage one round."""
    if any(getattr(one, "needs_spark", False) for one in settings.callbacks):
        return replace(settings.run, rounds_per_stage=1)
    return settings.run


def _info(settings: FitSettings, fit: Fit, ingested: Ingested) -> FitInfo:
    return FitInfo(
        run=fit.run,
        num_rounds=fit.schedule.num_rounds,
        committed=fit.state.committed,
        rows=sum(shard.rows["train"] for shard in ingested.facts),
        num_parameters=fit.layout.numel,
        settings=described(settings),
    )


def _run_rounds(fit: Fit, progress: Progress, callbacks: Callbacks, lease: Lease, courtesy: Courtesy | None) -> None:
    def free_slots() -> None:
        fit.close_stage()
        lease.lent = True

    progress.start(fit.schedule.num_rounds, fit.state.committed)
    lease.lent = False
    try:
        with contextlib.closing(fit.rounds()) as records:
            for record in records:
                lease.alive()
                progress.advance(record)
                if asked := callbacks.round(record, free_slots):
                    fit.stop(f"callback {asked} asked for it")
                lease.lent = False
                if courtesy is not None and courtesy.asks():
                    fit.close_stage()
    finally:
        lease.lent = True
    progress.finish(summary(fit.state.records[fit.resumed_from :]))


def _warm(module: nn.Module, source: nn.Module) -> None:
    try:
        module.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"warm_start: the model's parameters do not fit this estimator's: {error}. Use the same model and model_args."
        ) from error


def _clean(settings: FitSettings, spark: SparkSession, run: str) -> None:
    if not clean_executors(
        spark, run, settings.shard_dir, exchange=settings.exchange_dir, num_workers=settings.run.num_workers
    ):
        _LOG.warning(
            "not every executor could be cleaned of run %s; the next fit on its host sweeps what is left.", run
        )
