"""Factored optimizer state, which has the shape of a weight of one row, is not averaged, and no error either."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn
from twin import deal, flat, run, schema_of

from sparkdeep.models.program import Program


def test_adafactor_trains_with_averaged_state(tmp_path):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(32, 4))
    y = x[:, :1].copy()
    results = []
    for state in ("average", "keep"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        program = Program(model=model, loss=nn.MSELoss(), optimizer=partial(torch.optim.Adafactor, lr=0.05))
        options = {"batch_size": 8, "epochs": 3, "sync_every": 2, "inner_state": state}
        trained, records, _ = run(tmp_path, program, deal(x, y, [16, 16]), schema_of(x, y), **options)
        assert records[-1].loss < records[0].loss
        results.append(flat(trained))
    assert not torch.equal(*results), "what is not factored is averaged"
