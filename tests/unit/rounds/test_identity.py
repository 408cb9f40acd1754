"""A resumed run is the same run: what differs visibly has another identity, what is the same does not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from sparkdeep.models.program import Program
from sparkdeep.protocol.messages import ShardFacts
from sparkdeep.rounds.identity import describe, run_identity, tensors_digest
from sparkdeep.settings.run import LocalSettings, RunSettings

SHARDS = [ShardFacts(rows={"train": 5, "validation": 0}, digest="d")]


def augment(x):
    return x


def identity(*, local=None, run=None, outer=None, warm_start=None, shards=SHARDS, **parts):
    torch.manual_seed(len(parts))  # fresh parameters differ from script to script
    program = Program(
        model=nn.Linear(2, 1), **{"loss": nn.MSELoss(), "optimizer": partial(torch.optim.SGD, lr=0.1), **parts}
    )
    return run_identity(
        program, LocalSettings(**local or {}), RunSettings(**run or {}), shards,
        schema={}, outer_optimizer=outer, warm_start=warm_start,
    )  # fmt: skip


def test_the_same_call_in_another_process_is_the_same_run():
    assert identity() == identity(loss=nn.MSELoss())


def test_a_finished_run_may_be_made_longer():
    assert identity(run={"epochs": 3}) == identity(run={"epochs": 9})


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("optimizer", {"optimizer": partial(torch.optim.SGD, lr=0.2)}),
        ("optimizer", {"optimizer": torch.optim.Adam}),
        ("loss", {"loss": nn.L1Loss()}),
        ("loss", {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}),
        ("lr_scheduler", {"lr_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=3)}),
        ("augment", {"augment": augment}),
        ("outer_optimizer", {"outer": partial(torch.optim.SGD, lr=0.7)}),
        ("warm_start", {"warm_start": nn.Linear(2, 1)}),
        ("clip_grad_norm", {"local": {"clip_grad_norm": 1.0}}),
        ("precision", {"local": {"precision": "bf16"}}),
        ("seed", {"local": {"seed": 1}}),
        ("sync_every", {"run": {"sync_every": 3}}),
        ("shards", {"shards": [ShardFacts(rows={"train": 5, "validation": 0}, digest="e")]}),
    ],
)
@pytest.mark.fault(rows=[25], phases="RS")
def test_what_differs_is_named(key, change):
    before, after = identity(), identity(**change)
    assert {k for k in before if before[k] != after[k]} - {"details"} == {key}


def test_losses_that_print_alike_are_told_apart_by_their_settings_and_tensors():
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))
    assert repr(weighted) == repr(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])))
    assert describe(weighted) != describe(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])))
    assert describe(weighted) == describe(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])))


def test_a_digest_sees_one_changed_element_of_any_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        module = nn.Linear(3, 2).to(dtype)
        before = tensors_digest(module)
        with torch.no_grad():
            module.bias[1] += 1
        assert tensors_digest(module) != before
