"""Post-local SGD against torch's own `PostLocalSGDOptimizer`, in two processes that average among themselves."""

from __future__ import annotations

import socket
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from plain_loop import epoch_batches
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.optim import SGD
from twin import deal, flat, run, schema_of

from sparkdeep.models.program import Program
from sparkdeep.optim.local_work import PostLocal

with warnings.catch_warnings():  # torch compiles beside it what it calls deprecated itself
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import PostLocalSGDOptimizer

SWITCH, PERIOD, STEPS, BATCH = 5, 3, 12, 2
ROWS = STEPS * BATCH


def table():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(2 * ROWS, 3))
    return x, x @ rng.normal(size=(3, 1)) + 0.2 * rng.normal(size=(2 * ROWS, 1))


def network():
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def peer(rank, port, batches, sums):
    """One process of torch's: gradients are averaged until the switch, parameters every few steps after it."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, y = (torch.from_numpy(a)[rank * ROWS : (rank + 1) * ROWS] for a in table())
    model = network()
    averager = PeriodicModelAverager(period=PERIOD, warmup_steps=SWITCH)
    optimizer = PostLocalSGDOptimizer(optim=SGD(model.parameters(), lr=0.2), averager=averager)
    for step, rows in enumerate(batches[rank]):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        if step < SWITCH:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2
        optimizer.step()
    sums[rank].copy_(flat(model))
    dist.destroy_process_group()


def torchs(batches):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ends = [torch.zeros(flat(network()).numel(), dtype=torch.float64).share_memory_() for _ in range(2)]
    mp.spawn(peer, args=(port, batches, ends), nprocs=2)
    assert torch.equal(*ends)
    return ends[0]


@pytest.mark.identity(18)
def test_post_local_sgd_is_torchs(tmp_path):
    x, y = table()

    def trained(switch):
        own = Program(model=network(), loss=nn.MSELoss(), optimizer=partial(SGD, lr=0.2))
        options = {"epochs": 1, "batch_size": BATCH, "sync_every": PERIOD, "schedule": PostLocal(switch)}
        _, records, fit = run(tmp_path, own, deal(x, y, [ROWS, ROWS]), schema_of(x, y), **options)
        return flat(own.model), records, [shard.digest for shard in fit.shards]

    # torch takes its first mean of parameters after one more step than it has taken means of gradients.
    got, records, digests = trained(SWITCH + 1)
    assert [r.replicas[0].steps for r in records] == [1] * (SWITCH + 1) + [PERIOD] * 2
    batches = [
        [torch.from_numpy(rows.copy()) for rows in epoch_batches(ROWS, BATCH, digest=d, epoch=0)] for d in digests
    ]
    theirs = torchs(batches)
    torch.testing.assert_close(got, theirs, rtol=1e-13, atol=1e-14)
    assert (trained(0)[0] - theirs).abs().max() > 1e-5, "another switch is another run"
