"""What a round counts of its replicas: their state also where a single row weighs, and the bytes of this round alone."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn
from twin import deal, run, schema_of

from sparkdeep.models.program import Program


class Seen(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.seen += len(x)
        return self.net(x)


def fit(tmp_path, rows, **options):
    x = np.random.default_rng(0).normal(size=(sum(rows), 3)).astype(np.float32)
    program = Program(
        model=Seen(), loss=nn.MSELoss(), optimizer=partial(torch.optim.SGD, lr=0.1), buffers={"seen": "sum"}
    )
    return run(tmp_path, program, deal(x, x[:, :1], rows), schema_of(x, x[:, :1]), **options)


def test_the_state_of_a_replica_that_weighs_one_row_counts(tmp_path):
    model, records, _ = fit(tmp_path, [1, 1], batch_size=1, epochs=1, sync_every=1)
    assert [part.weight for part in records[0].replicas] == [1.0, 1.0]
    assert int(model.seen) == 2


def test_a_rounds_traffic_is_its_own(tmp_path):
    _, records, own = fit(tmp_path, [8, 8], batch_size=4, epochs=4, sync_every=1, rounds_per_stage=100)
    assert len(records) == 8
    least = 2 * own.layout.num_bytes
    for record in records:
        for sent in (record.sent_bytes, record.received_bytes):
            assert least < sent < 8000, "headers, parameters and a counter of two replicas"
    # Numbers in headers take more digits later, and nothing else grows.
    assert abs(records[-1].sent_bytes - records[1].sent_bytes) < 100
    assert abs(records[-1].received_bytes - records[1].received_bytes) < 400
