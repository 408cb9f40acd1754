"""Listeners of a fit on Spark: averages of its rounds' parameters, and checkpoints that they ask for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from spark_models import Dropped, estimator, same_bits

from sparkdeep import EMA, SWA, Callback, soup

pytestmark = [pytest.mark.spark, pytest.mark.algorithms]


class Kept(Callback):
    """Every round's parameters; asks for a checkpoint after the second round."""

    def __init__(self):
        self.rounds = []

    def on_round_parameters(self, record, parameters):
        self.rounds.append(parameters)

    def on_round_end(self, record):
        return "checkpoint" if record.round == 2 else None


@pytest.mark.parametrize("transport", ["socket", "spark"])
def test_averages_are_of_the_rounds_and_a_model_of_them_scores(blobs, tmp_path, transport):
    kept, ema, swa = Kept(), EMA(0.7), SWA(start_round=2)
    options = {"model": Dropped, "sync_every": 10, "epochs": 1, "batch_size": 4, "transport": transport}
    model = estimator(
        callbacks=[kept, ema, swa], checkpoint_dir=str(tmp_path / "run"), checkpoint_every=100, **options
    ).fit(blobs)
    assert len(kept.rounds) == len(model.history) > 2
    assert [r.round for r in model.history if r.checkpoint_bytes] == [2, len(model.history)]
    for name in kept.rounds[0]:
        stacked = np.stack([one[name].double().numpy() for one in kept.rounds])
        moving = stacked[0]
        for one in stacked[1:]:
            moving = 0.7 * moving + 0.3 * one
        np.testing.assert_allclose(ema.parameters[name], moving, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(swa.parameters[name], stacked[1:].mean(0), rtol=1e-12, atol=1e-14)
    averaged = ema.model(model)
    own = averaged.model.layers[0].weight.detach()
    assert torch.equal(own, ema.parameters["layers.0.weight"].float())
    assert not torch.equal(own, model.model.layers[0].weight.detach())
    assert same_bits(dict(averaged.model.named_buffers()), dict(model.model.named_buffers()))
    mixed = soup([averaged, model])
    scores = [m.transform(blobs.limit(5)).count() for m in (averaged, mixed)]
    assert scores == [5, 5]
