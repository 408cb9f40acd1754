"""Downpour with replicas that are tasks: the preset trains, its arrivals are recorded, a lost task's window is repeated."""

from __future__ import annotations

import pytest
import torch
from spark_models import Dropped, estimator, same_bits, weights

from sparkdeep import algorithms
from sparkdeep.errors import ConfigError
from sparkdeep.optim.asynchronous import Asynchronous
from sparkdeep.testing.injection import Injector

pytestmark = [pytest.mark.spark, pytest.mark.algorithms]


def downpour(**options):
    """The preset; the settings that the tests' estimator has for itself are given anew, as they win over a preset's."""
    preset = algorithms.downpour(lr=0.05, n_fetch=1, n_push=2, warm_start=4)
    own = {name: preset.settings[name] for name in ("optimizer", "sync_every")}
    return estimator(**{"algorithm": preset, **own, "epochs": 3, **options})


def test_the_preset_trains_on_its_own_fetches_and_pushes(blobs):
    model = downpour().fit(blobs)
    first, *others = model.history
    assert [part.dropped for part in first.replicas] == ["", "idle"]
    assert {replica for replica, _ in first.arrivals} == {0}
    for record in others:
        pushes = [sum(i == replica and s >= 0 for i, s in record.arrivals) for replica in range(2)]
        assert pushes == [-(-part.steps // 2) for part in record.replicas]
    assert model.history[-1].loss < 0.5 * first.loss
    assert all(torch.isfinite(value).all() for value in weights(model).values())
    again = downpour(replay=model.history).fit(blobs)
    assert same_bits(weights(again), weights(model))
    assert [record.arrivals for record in again.history] == [record.arrivals for record in model.history]


def test_a_task_that_is_lost_in_a_window_costs_that_window(blobs, tmp_path):
    injector = Injector(tmp_path / "plan").kill_at("transfer", 2, 1)
    bounded = Asynchronous(n_fetch=2, n_push=2, max_staleness=2)
    model = downpour(asynchronous=bounded, schedule=None, model=Dropped, preprocess=injector.carrier()).fit(blobs)
    injector.check_fired()
    assert [record.retries for record in model.history] == [0, 1, 0]
    assert sum(record.rows for record in model.history) == 3 * blobs.count()
    assert max(s for record in model.history for _, s in record.arrivals) <= 2


def test_a_driver_that_takes_no_connections_says_so(blobs):
    with pytest.raises(ConfigError, match=r"asynchronous=Asynchronous\(n_fetch=1, n_push=2.* with transport='spark'"):
        downpour(transport="spark").fit(blobs)
