"""Real handwriting, on the twin: averaging two replicas costs no accuracy against one process of plain torch."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import twin
from torch import nn

from sparkdeep.models.program import Program

sklearn_datasets = pytest.importorskip("sklearn.datasets")

EPOCHS = 12
BATCH = 32
LR = 1e-3


def digits(seed):
    """(train x, train y, test x, test y), a fifth held out."""
    images, labels = sklearn_datasets.load_digits(return_X_y=True)
    x, y = (images / 16).astype(np.float32), labels.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order], y[order]
    held_out = len(x) // 5
    return x[held_out:], y[held_out:], x[:held_out], y[:held_out]


def accuracy(model, x, y):
    model.eval()
    with torch.inference_mode():
        return float((model(torch.from_numpy(x)).argmax(1) == torch.from_numpy(y)).double().mean())


def one_process(x, y, seed):
    from digits import Net

    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    loss = nn.CrossEntropyLoss()
    model.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(x))
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            loss(model(torch.from_numpy(x)[rows]), torch.from_numpy(y)[rows]).backward()
            optimizer.step()
    return model


def two_replicas(tmp_path, x, y, seed):
    from digits import Net

    torch.manual_seed(seed)
    program = Program(model=Net(), loss=nn.CrossEntropyLoss(), optimizer=partial(torch.optim.Adam, lr=LR))
    half = len(x) // 2
    parts = twin.deal(x, y, [half, len(x) - half])
    model, records, _ = twin.run(
        tmp_path, program, parts, twin.schema_of(x, y), epochs=EPOCHS, batch_size=BATCH, sync_every=10, seed=seed
    )
    assert sum(record.rows for record in records) == EPOCHS * len(x)
    return model


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_replicas_reach_97_percent_and_lose_at_most_a_point_against_one_process(tmp_path, seed):
    x, y, test_x, test_y = digits(seed)
    alone = accuracy(one_process(x, y, seed), test_x, test_y)
    together = accuracy(two_replicas(tmp_path, x, y, seed), test_x, test_y)
    print(f"seed {seed}: one process {alone:.4f}, two replicas {together:.4f}")
    assert together >= 0.97
    assert together >= alone - 0.01


def test_an_untrained_network_does_not(tmp_path):
    from digits import Net

    _, _, test_x, test_y = digits(0)
    assert accuracy(Net(), test_x, test_y) < 0.5
