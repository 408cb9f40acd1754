"""Barrier stages keep the launchers' contract."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial
from types import SimpleNamespace

import launcher_contract
import pytest
from launcher_contract import *  # noqa: F403 (the contract's tests, collected here with Spark's world)
from spark_models import emit
from twin import local_coordinator

from sparkdeep.rounds.fit import Fit, new_run_id, plan_of
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.spark.ingest.ingest import read_manifests, shards_of
from sparkdeep.spark.ingest.tasks import FLAG, numbered
from sparkdeep.spark.session.jobs import SparkJob
from sparkdeep.spark.tasks.cleaning import clean_executors
from sparkdeep.spark.tasks.replica_tasks import BarrierLauncher
from sparkdeep.stages.opener import SocketStages

pytestmark = pytest.mark.spark


class SparkWorld:
    """Replicas are tasks of a barrier stage, on shards that a barrier stage wrote."""

    def __init__(self, spark):
        self._spark = spark

    @contextlib.contextmanager
    def fit(self, program, parts, schema, **options):
        lists = [[part[name].tolist() for name in ("features", "label")] for part in parts]
        kinds = f"{numbered(0)} array<double>, {numbered(1)} array<double>, {FLAG} boolean"
        rows = self._spark.range(0, len(parts), 1, len(parts)).mapInArrow(partial(emit, lists), kinds)
        run = new_run_id()
        generation = shards_of(rows, schema, run=run, decode=None, shard_dir=None, profile=None)
        local = LocalSettings(**_taken(LocalSettings, options))
        settings = RunSettings(num_workers=len(parts), **_taken(RunSettings, options))
        coordinator = local_coordinator()
        try:
            job = SparkJob(self._spark, generation, tag=f"sparkdeep-{run}-ingest", description="ingest")
            ingested = read_manifests(job.result(60.0, "ingest"), schema, len(parts))
            plan = plan_of(program, local, ingested.schema)
            launcher = BarrierLauncher(
                self._spark,
                SimpleNamespace(frame=generation, num_workers=len(parts)),
                plan=plan,
                shard_dir=None,
                worker_process="auto",
                profile=None,
            )
            yield Fit(
                program=program,
                local=local,
                settings=settings,
                plan=plan,
                shards=ingested.facts,
                stages=SocketStages(launcher=launcher, coordinator=coordinator),
                run=run,
                **options,
            )
        finally:
            coordinator.close()
            generation.unpersist()
            clean_executors(self._spark, run, None)

    def running(self):
        return [f"job {number}" for number in self._spark.sparkContext.statusTracker().getActiveJobsIds()]

    def printed(self, capfd, lines):
        return "\n".join(lines)


def _taken(kind, options):
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: options.pop(name) for name in list(options) if name in names}


@pytest.fixture
def world(spark):
    return SparkWorld(spark)


def test_the_contract_is_collected_whole():
    promised = [name for name in dir(launcher_contract) if name.startswith("test_")]
    assert promised
    assert all(name in globals() for name in promised)
