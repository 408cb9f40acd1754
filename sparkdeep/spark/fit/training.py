"""The steps of a fit on Spark: ingest, rehearsal, rounds, the model; cleaned up after, whatever happened."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from pyspark.sql import DataFrame, SparkSession

from sparkdeep import seams
from sparkdeep.data.schema import Schema
from sparkdeep.errors import ConfigError
from sparkdeep.models.prediction import Prediction
from sparkdeep.models.program import Program, other_modules
from sparkdeep.models.registry import reference_of
from sparkdeep.rounds.fit import Fit, new_run_id, plan_of
from sparkdeep.settings.run import RunSettings
from sparkdeep.spark.fit.checkpoints import checkpoints_of, open_folder
from sparkdeep.spark.fit.programs import columns_read, program_of, rehearsed, schema_for
from sparkdeep.spark.fit.settings import FitSettings, described
from sparkdeep.spark.fit.shard_source import ShardSource
from sparkdeep.spark.fit.transports import check_load, chosen, guarded, probe, stages_of, transport_for
from sparkdeep.spark.ingest.ingest import Ingested
from sparkdeep.spark.ingest.petastorm_source import active_session, source_of
from sparkdeep.spark.model.model import TorchModel
from sparkdeep.spark.session.access import access_to
from sparkdeep.spark.session.preflight import check_session, check_slots, task_profile
from sparkdeep.spark.session.slots import Courtesy, Lease, ledger_of
from sparkdeep.spark.tasks.cleaning import clean_executors
from sparkdeep.tracking.callbacks import Callbacks, FitInfo, Phases
from sparkdeep.tracking.progress import Progress
from sparkdeep.tracking.records import RoundRecord, summary

__all__ = ["train"]

_LOG = logging.getLogger("sparkdeep")
_SLOT_TIMEOUT_S: Final = 30.0
_HANDED_ON: Final = ("prediction", "prediction_col", "probability_col", "raw_prediction_col")


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """What the checks found: a fit that its session can run."""

    settings: FitSettings
    """As they hold in this session."""
    dataset: DataFrame
    spark: SparkSession
    transport: str
    """See `transports.chosen`."""
    profile: Any
    """The resource profile of its stages, or None."""


def train(settings: FitSettings, dataset: DataFrame, warm_start: TorchModel | None) -> TorchModel:
    """Ingest, rehearse, train round by round, and clean up, also after a failure; see `TorchEstimator.fit`."""
    phases = Phases()
    checked = _checked(settings, dataset, warm_start)
    settings, spark = checked.settings, checked.spark
    program = program_of(settings, warm_start)
    schema = schema_for(settings, checked.dataset, program)
    run = new_run_id()
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(_slots(checked, run))
        shards = ShardSource(checked.dataset, settings, schema, run=run, profile=checked.profile, on_busy=lease.alive)
        phases.end("checks")
        stack.callback(_clean, settings, spark, run)
        stack.callback(shards.close)
        if checked.transport == "spark":
            probe(settings, spark, run, checked.profile)
        ingested = shards.ingest()
        phases.end("ingest")
        program, prediction = rehearsed(settings, program, ingested)
        phases.end("rehearsal")
        plan = plan_of(program, settings.local, ingested.schema, steps=settings.run.work == "local")
        transport = transport_for(
            settings, spark, shards, plan=plan, run=run, profile=checked.profile, on_busy=lease.alive
        )
        progress = stack.enter_context(Progress(enabled=settings.progress))
        fit = Fit(
            program=program,
            local=settings.local,
            settings=_staged(settings),
            plan=plan,
            shards=ingested.facts,
            run=run,
            outer_optimizer=settings.outer_optimizer,
            checkpoints=checkpoints_of(settings, spark, program, ingested, warm_start),
            resume=bool(settings.resume),
            replay=settings.replay,
            on_beat=partial(_beat, lease, progress),
            on_log=progress.log,
            stages=stages_of(transport, settings, spark, stack),
        )
        check_load(settings, fit, transport)
        info = _info(settings, fit, ingested)
        _announce(settings, fit, info)
        callbacks = Callbacks([phases, *settings.callbacks])
        try:
            callbacks.start(info)
            courtesy = Courtesy(spark) if checked.transport == "socket" else None
            _run_rounds(fit, progress, callbacks, lease, courtesy)
        except BaseException as error:
            callbacks.end(None, error)
            raise
        fit.load_result()
    model = _model(settings, program, ingested.schema, prediction, fit.state.records)
    model.startup = phases.startup
    callbacks.end(model, None)
    return model


def _checked(settings: FitSettings, dataset: DataFrame, warm_start: TorchModel | None) -> _Checked:
    """Refuse what cannot run before anything runs."""
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
    open_folder(settings, spark)
    return _Checked(settings=settings, dataset=dataset, spark=spark, transport=transport, profile=profile)


def _slots(checked: _Checked, run: str) -> contextlib.AbstractContextManager[Lease]:
    num_workers, access = checked.settings.run.num_workers, access_to(checked.spark)
    return ledger_of(access.application).hold(
        f"fit {run}",
        num_workers,
        lambda: access.slots(checked.profile) or num_workers,
        timeout_s=checked.settings.run.open_timeout_s,
    )


def _beat(lease: Lease, progress: Progress, replica: int, rows: int) -> None:
    lease.alive()
    progress.beat(replica, rows)


def _announce(settings: FitSettings, fit: Fit, info: FitInfo) -> None:
    if info.committed:
        _LOG.warning(
            "going on with the run in %s after round %d%s%s",
            info.settings["checkpoint_dir"],
            info.committed,
            "" if fit.num_rounds is None else f" of {fit.num_rounds}",
            ": it is finished, nothing is trained; resume=False or another checkpoint_dir starts a new one"
            if fit.finished
            else "",
        )
    _LOG.info(
        "%d training rows on %d replicas, batch %d each (%d together), %s rounds, %.1f MB of parameters",
        info.rows,
        settings.run.num_workers,
        settings.local.batch_size,
        settings.local.batch_size * settings.run.num_workers,
        fit.num_rounds or "as yet unknown",
        fit.layout.num_bytes / 1e6,
    )


def _model(
    settings: FitSettings, program: Program, schema: Schema, prediction: Prediction, history: Sequence[RoundRecord]
) -> TorchModel:
    return TorchModel(
        module=program.model.eval(),
        schema=schema,
        written=prediction,
        history=history,
        # One with state is given back as training has left it.
        preprocess=program.preprocess if other_modules(program, "preprocess") else settings.preprocess,
        collate=settings.collate,
        decode=settings.decode,
        reference=reference_of(settings.model, settings.model_args),
        batch_size=max(settings.local.batch_size, 256),
        **{name: getattr(settings, name) for name in _HANDED_ON if getattr(settings, name) is not None},
    )


def _staged(settings: FitSettings) -> RunSettings:
    """The run's settings; with a callback that needs the slots after every round, each stage has only one."""
    needed = any(getattr(one, "needs_spark", False) for one in settings.callbacks)
    return replace(settings.run, rounds_per_stage=1) if needed else settings.run


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
