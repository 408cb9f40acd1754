"""A replica by itself, against what the driver's rehearsal promised."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from twin import schema_of, write_shards

from sparkdeep.data.shards import Shard
from sparkdeep.models.program import Program
from sparkdeep.models.rehearsal import rehearse, sample_batch
from sparkdeep.protocol.messages import RoundSpec
from sparkdeep.replica.replica import Replica
from sparkdeep.settings.run import LocalSettings

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
Y = X[:, :1].copy()


@pytest.fixture
def shard(tmp_path):
    [path] = write_shards(tmp_path, [{"features": X, "label": Y}], schema_of(X, Y))
    shard = Shard.open(path)
    yield shard
    shard.close()


def replica_of(shard, model, device="cpu", loss=None, **parts):
    optimizer = partial(torch.optim.SGD, lr=0.1)
    program = Program(model=model, loss=loss or nn.MSELoss(), optimizer=optimizer, **parts)
    settings = LocalSettings(batch_size=4)
    return Replica(program, settings, schema_of(X, Y), shard, number=0, device=torch.device(device))


class Spy(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.ones(3))

    def forward(self, x, _label=None):
        return x


def test_every_module_of_the_program_goes_where_the_replica_computes(shard):
    preprocess, augment, metric, loss = Spy(), Spy(), Spy(), nn.BCEWithLogitsLoss(pos_weight=torch.ones(1))
    replica_of(
        shard, nn.Linear(3, 1), "meta", loss, preprocess=preprocess, augment=partial(augment), metrics={"m": metric}
    )
    assert {t.device.type for t in (preprocess.table, augment.table, metric.table, loss.pos_weight)} == {"meta"}


class Backbone(nn.Module):
    """A frozen bfloat16 part under a head that learns in float32."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 4).to(torch.bfloat16).requires_grad_(False)
        self.head = nn.Linear(4, 1)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.dtype)
        return self.head(self.backbone(x).float())


def test_training_feeds_the_dtype_that_the_rehearsal_fed(shard):
    def loss(output, label):
        return (output - label.float()).square().mean()

    model = Backbone()
    program = Program(model=model, loss=loss, optimizer=partial(torch.optim.SGD, lr=0.1))
    rehearse(program, sample_batch({"features": X, "label": Y}, schema_of(X, Y), program), schema_of(X, Y))
    replica = replica_of(shard, model, loss=loss)
    result = replica.train(RoundSpec(round=1, epoch=0, first_step=0, num_steps=1))
    assert result.update.rows == 4
    assert set(model.seen) == {torch.bfloat16}
