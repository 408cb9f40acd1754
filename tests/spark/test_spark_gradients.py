"""Gradient rounds on Spark: exact data-parallel Adam over barrier stages, and L-BFGS over portions that are ordinary tasks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from spark_models import estimator, same_bits, weights

from sparkdeep import ConfigError
from sparkdeep.algorithms import lbfgs

pytestmark = [pytest.mark.spark, pytest.mark.algorithms]

ADAM = partial(torch.optim.AdamW, lr=1e-2)


def gradient(**given):
    return estimator(work="gradient", **{"optimizer": None, "outer_optimizer": ADAM, "epochs": 2, **given})


def test_adam_by_gradients_needs_no_optimizer_of_the_replicas(blobs):
    model = gradient(sync_every=2).fit(blobs)
    assert model.history[-1].loss < model.history[0].loss
    assert all(len(record.evaluations) == 1 for record in model.history)
    assert same_bits(weights(model), weights(gradient(sync_every=2, rounds_per_stage=1).fit(blobs)))


def test_lbfgs_over_a_barrier_stage_converges(blobs):
    model = estimator(optimizer=None, algorithm=lbfgs().replace(portions=None), epochs=6, sync_every="epoch").fit(blobs)
    assert model.history[-1].loss < 0.3 * model.history[0].evaluations[0].loss
    assert [record.evaluations[0].cached for record in model.history] == [False] + [True] * (len(model.history) - 1)


def test_what_does_not_fit_is_refused_before_a_job_runs(blobs):
    with pytest.raises(ConfigError, match="without outer_optimizer"):
        gradient(outer_optimizer=None).fit(blobs)
    with pytest.raises(ConfigError, match="work='local'"):
        estimator(outer_optimizer=torch.optim.LBFGS).fit(blobs)
    with pytest.raises(ConfigError, match=r"optimizer=LBFGS.*closure"):
        estimator(optimizer=torch.optim.LBFGS).fit(blobs)


def jobs_of(spark):
    """Description and completed stages of every job so far, by its number."""
    found = {}
    jobs = spark.sparkContext._jsc.sc().statusStore().jobsList(None)
    for i in range(jobs.size()):
        job = jobs.apply(i)
        text = job.description().get() if job.description().isDefined() else ""
        found[job.jobId()] = (text, job.numCompletedStages(), job.numCompletedTasks())
    return found


@pytest.mark.identity(10)
def test_lbfgs_over_portions_is_a_stage_an_evaluation(spark, blobs):
    before = jobs_of(spark)
    model = estimator(optimizer=None, algorithm=lbfgs(), epochs=5, sync_every="epoch", portions=6).fit(blobs)
    asked = sum(not one.cached for record in model.history for one in record.evaluations)
    rounds = [job for number, job in jobs_of(spark).items() if number not in before and "fit: round" in job[0]]
    assert [(stages, tasks) for _, stages, tasks in rounds] == [(1, 6)] * asked
    assert len(model.history) <= 5 < asked
    assert all(len(record.replicas) == 6 for record in model.history)
    assert sum(record.rows for record in model.history) == 200 * asked
    barrier = estimator(optimizer=None, algorithm=lbfgs(), epochs=5, sync_every="epoch", portions=None).fit(blobs)
    assert abs(barrier.history[-1].loss - model.history[-1].loss) < 1e-3


def test_portions_in_a_shared_folder_and_validation_rows(blobs, tmp_path):
    model = estimator(
        optimizer=None,
        algorithm=lbfgs(),
        epochs=3,
        sync_every="epoch",
        portions=3,
        shard_dir=str(tmp_path / "shards"),
        validation=0.2,
    ).fit(blobs)
    assert model.history[-1].metrics["loss"] < model.history[0].evaluations[0].loss
    assert not list((tmp_path / "shards").iterdir())


def test_portions_refuse_what_needs_replicas(blobs):
    for given, what in ({"transport": "socket"}, "transport='socket'"), ({"deal": "partitions"}, "deal='partitions'"):
        with pytest.raises(ConfigError, match=f"{what} with portions=4"):
            estimator(optimizer=None, algorithm=lbfgs(), sync_every="epoch", portions=4, **given).fit(blobs)
