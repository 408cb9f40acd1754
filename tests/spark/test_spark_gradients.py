"""Gradient rounds on Spark: exact data-parallel Adam over barrier stages, and L-BFGS over portions that are ordinary tasks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from spark_models import estimator, same_bits, weights

from sparkdeep import ConfigError
from sparkdeep.algorithms import lbfgs

pytestmark = pytest.mark.spark

ADAM = partial(torch.optim.AdamW, lr=1e-2)


def gradient(**given):
    return estimator(work="gradient", **{"optimizer": None, "outer_optimizer": ADAM, "epochs": 2, **given})


def test_adam_by_gradients_needs_no_optimizer_of_the_replicas(blobs):
    model = gradient(sync_every=2).fit(blobs)
    assert model.history[-1].loss < model.history[0].loss
    assert all(len(record.evaluations) == 1 for record in model.history)
    assert same_bits(weights(model), weights(gradient(sync_every=2, rounds_per_stage=1).fit(blobs)))


def test_lbfgs_over_a_barrier_stage_converges(blobs):
    model = estimator(optimizer=None, algorithm=lbfgs(iterations=6).replace(portions=None)).fit(blobs)
    assert model.history[-1].loss < 0.3 * model.history[0].evaluations[0].loss
    assert [record.evaluations[0].cached for record in model.history] == [False] + [True] * (len(model.history) - 1)


def test_what_does_not_fit_is_refused_before_a_job_runs(blobs):
    with pytest.raises(ConfigError, match="without outer_optimizer"):
        gradient(outer_optimizer=None).fit(blobs)
    with pytest.raises(ConfigError, match="work='local'"):
        estimator(outer_optimizer=torch.optim.LBFGS).fit(blobs)
    with pytest.raises(ConfigError, match=r"optimizer=LBFGS.*closure"):
        estimator(optimizer=torch.optim.LBFGS).fit(blobs)
