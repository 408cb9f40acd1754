"""The oracle: a torch training loop as anyone would write it, over the batches that a replica visits."""

from __future__ import annotations

import torch

from sparkdeep.data.order import EpochOrder, batch_range, num_batches


def epoch_batches(rows, batch_size, *, digest, epoch, seed=0):
    """Row numbers of each batch of an epoch."""
    order = EpochOrder(rows, seed=seed, epoch=epoch, digest=digest)
    return [order.indices(*batch_range(rows, batch_size, i)) for i in range(num_batches(rows, batch_size))]


def train_plainly(
    model,
    x,
    y,
    *,
    digest,
    loss,
    optimizer,
    epochs,
    batch_size,
    seed=0,
    accumulate=1,
    clip=None,
    scheduler=None,
    autocast=False,
):
    torch.manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    opt = optimizer(parameters)
    clock = scheduler(opt) if scheduler else None
    model.train()
    losses = []
    for epoch in range(epochs):
        batches = epoch_batches(len(x), batch_size, digest=digest, epoch=epoch, seed=seed)
        for first in range(0, len(batches), accumulate):
            group = batches[first : first + accumulate]
            total = sum(len(rows) for rows in group)
            opt.zero_grad()
            for rows in group:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    value = loss(model(torch.from_numpy(x[rows])), torch.from_numpy(y[rows]))
                losses.append(float(value.detach()))
                (value if len(group) == 1 else value * (len(rows) / total)).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            opt.step()
            if clock is not None:
                clock.step()
    return losses
