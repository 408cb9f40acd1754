"""The steps of a fit on Spark: ingest, rehearsal, rounds, the model; cleaned up after, whatever happened."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import Any, Final

from pyspark.sql import DataFrame, SparkSession

from sparkdeep import seams
from sparkdeep.errors import ConfigError
from sparkdeep.models.program import Program
from sparkdeep.models.registry import reference_of
from sparkdeep.protocol.plans import ReplicaPlan
from sparkdeep.rounds.fit import Fit, new_run_id, plan_of
from sparkdeep.settings.run import RunSettings
from sparkdeep.spark.fit.checkpoints import checkpoints_of, open_folder
from sparkdeep.spark.fit.programs import columns_read, program_of, rehearsed, schema_for
from sparkdeep.spark.fit.settings import FitSettings, described
from sparkdeep.spark.fit.shard_source import ShardSource
from sparkdeep.spark.fit.transports import Transport, check_load, chosen, guarded, probe, stages_of, transport_for
from sparkdeep.spark.ingest.ingest import Ingested
from sparkdeep.spark.ingest.petastorm_source import active_session, source_of
from sparkdeep.spark.model.model import TorchModel
from sparkdeep.spark.session.access import access_to
from sparkdeep.spark.session.preflight import available_slots, check_session, check_slots, task_profile
from sparkdeep.spark.session.slots import Courtesy, Lease, ledger_of
from sparkdeep.spark.tasks.cleaning import clean_executors
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.tracking.callbacks import Callbacks, FitInfo
from sparkdeep.tracking.progress import Progress
from sparkdeep.tracking.records import summary
from sparkdeep.tracking.startup import Phases

__all__ = ["train"]

_LOG = logging.getLogger("sparkdeep")
_SLOT_TIMEOUT_S: Final = 30.0
_HANDED_ON: Final = ("prediction", "prediction_col", "probability_col", "raw_prediction_col")


def train(settings: FitSettings, dataset: DataFrame, warm_start: TorchModel | None) -> TorchModel:
    """Ingest, rehearse, train round by round, and clean up, also after a failure; see `TorchEstimator.fit`."""
    phases = Phases()
    if (source := source_of(dataset)) is not None:
        dataset = source.dataframe(active_session(), settings.run.num_workers, columns_read(settings))
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
    seams.reach("preflight")
    open_folder(settings, spark)  # a folder that cannot be opened is refused before anything runs
    program = program_of(settings, warm_start)
    schema = schema_for(settings, dataset, program)
    run = new_run_id()
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(_slots(settings, spark, run, profile))
        shards = ShardSource(dataset, settings, schema, run=run, profile=profile, on_busy=lease.alive)
        phases.end("checks")
        stack.callback(lambda: _clean(settings, spark, run))
        stack.callback(shards.close)
        if transport == "spark":
            probe(settings, spark, run, profile)
        ingested = shards.ingest()
        phases.end("ingest")
        program, prediction = rehearsed(settings, program, ingested)
        phases.end("rehearsal")
        launcher = transport_for(
            settings,
            spark,
            shards,
            plan=_plan(settings, program, ingested),
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


def _plan(settings: FitSettings, program: Program, ingested: Ingested) -> ReplicaPlan:
    return plan_of(program, settings.local, ingested.schema, steps=settings.run.work == "local")


def _slots(
    settings: FitSettings, spark: SparkSession, run: str, profile: Any
) -> contextlib.AbstractContextManager[Lease]:
    return ledger_of(access_to(spark).application).hold(
        f"fit {run}",
        settings.run.num_workers,
        lambda: available_slots(spark, profile) or settings.run.num_workers,
        timeout_s=settings.run.open_timeout_s,
    )


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
        plan=_plan(settings, program, ingested),
        shards=ingested.facts,
        run=run,
        outer_optimizer=settings.outer_optimizer,
        checkpoints=checkpoints,
        resume=bool(settings.resume),
        replay=settings.replay,
        on_beat=beat,
        on_log=progress.log,
        stages=stages_of(launcher, settings, spark, stack),
    )
    check_load(settings, fit, launcher)
    if fit.state.committed:
        _LOG.warning(
            "going on with the run in %s after round %d%s%s",
            described(settings)["checkpoint_dir"],
            fit.state.committed,
            "" if fit.num_rounds is None else f" of {fit.num_rounds}",
            ": it is finished, nothing is trained; resume=False or another checkpoint_dir starts a new one"
            if fit.finished
            else "",
        )
    rows = sum(shard.rows["train"] for shard in ingested.facts)
    _LOG.info(
        "%d training rows on %d replicas, batch %d each (%d together), %s rounds, %.1f MB of parameters",
        rows,
        settings.run.num_workers,
        settings.local.batch_size,
        settings.local.batch_size * settings.run.num_workers,
        fit.num_rounds or "as yet unknown",
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
        num_rounds=fit.num_rounds,
        committed=fit.state.committed,
        rows=sum(shard.rows["train"] for shard in ingested.facts),
        num_parameters=fit.layout.numel,
        settings=described(settings),
    )


def _run_rounds(fit: Fit, progress: Progress, callbacks: Callbacks, lease: Lease, courtesy: Courtesy | None) -> None:
    def free_slots() -> None:
        fit.close_stage()
        lease.lent = True

    progress.start(fit.num_rounds, fit.state.committed)
    lease.lent = False
    try:
        with contextlib.closing(fit.rounds()) as records:
            for record in records:
                lease.alive()
                progress.advance(record)
                if asked := callbacks.round(record, free_slots, parameters=fit.parameters, checkpoint=fit.checkpoint):
                    fit.stop(f"callback {asked} asked for it")
                lease.lent = False
                if courtesy is not None and courtesy.asks():
                    fit.close_stage()
    finally:
        lease.lent = True
    progress.finish(summary(fit.state.records[fit.resumed_from :]))


def _clean(settings: FitSettings, spark: SparkSession, run: str) -> None:
    if not clean_executors(
        spark, run, settings.shard_dir, exchange=settings.exchange_dir, num_workers=settings.run.num_workers
    ):
        _LOG.warning(
            "not every executor could be cleaned of run %s; the next fit on its host sweeps what is left.", run
        )
