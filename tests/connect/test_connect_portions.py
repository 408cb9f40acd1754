"""Gradients by portions on Spark Connect: ordinary jobs over persisted blocks, with the parameters in their closures."""

from __future__ import annotations

import pytest
from transport_models import Wide, estimator

from sparkdeep.algorithms import lbfgs
from sparkdeep.errors import PreflightError

pytestmark = pytest.mark.connect


def gradients(**given):
    settings = {"optimizer": None, "algorithm": lbfgs(), "epochs": 3, "sync_every": "epoch", "portions": 3}
    return estimator(**{**settings, **given})


def test_lbfgs_lowers_the_loss_by_portions(blobs):
    model = gradients(validation=0.2).fit(blobs)
    assert model.history[-1].loss < 0.5 * model.history[0].evaluations[0].loss
    assert model.history[-1].metrics["loss"] > 0
    assert all(len(record.replicas) == 3 for record in model.history)


def test_parameters_that_do_not_go_with_a_task_are_refused(blobs):
    with pytest.raises(PreflightError, match=r"portions= on Spark Connect.*classic session"):
        gradients(model=Wide, model_args={"megabytes": 6}).fit(blobs)
