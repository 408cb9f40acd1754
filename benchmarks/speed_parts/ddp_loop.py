"""DistributedDataParallel over gloo on images, scored on the held-out rows now and then with the clock stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from measuring.processes import in_gloo
from torch import nn

from speed_parts.images import Images

__all__ = ["Goal", "Score", "train_ddp"]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is trained, how, and how far."""

    model: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    batch_size: int
    """Of each replica."""
    score_every: int
    """Local steps between scores."""
    max_steps: int
    reached: Callable[[float, float], bool]
    """Of held-out loss and accuracy: whether this is enough."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The held-out rows after some steps."""

    step: int
    seconds: float
    """Of training, scoring left out."""
    loss: float
    accuracy: float


def train_ddp(rank: int, size: int, store: str, images: Images, goal: Goal, seed: int, device: str = "") -> list[Score]:
    """One of the processes; trains until the goal is reached or the steps are over, and gives the scores on the way.

    Args:
        rank: of this process.
        size: processes.
        store: the file in which they meet.
        images: all of them; every process trains on its own part of the training rows.
        goal: of the training.
        seed: of the initial network and of the order of rows.
        device: the network device for gloo; its own choice by default.
    """
    if device:
        os.environ["GLOO_SOCKET_IFNAME"] = device
    torch.manual_seed(seed)
    share = images.train_rows // size
    x, y = images.tensors(rank * share, (rank + 1) * share)
    test_x, test_y = images.tensors(images.train_rows, len(images.labels))
    generator, loss_of = np.random.default_rng([seed, rank]), nn.CrossEntropyLoss()
    scores: list[Score] = []
    with in_gloo(rank, size, store):
        network = goal.model()
        model = nn.parallel.DistributedDataParallel(network)
        optimizer = goal.optimizer(model.parameters())
        per_epoch, seconds = share // goal.batch_size, 0.0
        dist.barrier()
        began = time.perf_counter()
        for step in range(goal.max_steps):
            at = step % per_epoch
            if at == 0:
                order = torch.from_numpy(generator.permutation(share))
            chosen = order[at * goal.batch_size : (at + 1) * goal.batch_size]
            optimizer.zero_grad(set_to_none=True)
            loss_of(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            if (step + 1) % goal.score_every:
                continue
            seconds += time.perf_counter() - began
            with torch.no_grad():
                output = network(test_x)
                loss, right = float(loss_of(output, test_y)), float((output.argmax(1) == test_y).float().mean())
            scores.append(Score(step=step + 1, seconds=seconds, loss=loss, accuracy=right))
            if goal.reached(loss, right):
                break  # all processes hold the same network, and stop at the same step
            dist.barrier()
            began = time.perf_counter()
        dist.barrier()
    return scores
