"""Which modules are in train mode when: as the user set them."""

from __future__ import annotations

import torch
from torch import nn

from sparkdeep.models.modes import Modes
from sparkdeep.models.program import Program


def net():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))


def modes_of(model, **parts):
    return Modes(Program(model=model, optimizer=torch.optim.SGD, **{"loss": nn.MSELoss(), **parts}))


def states(model):
    return [part.training for part in model.modules()]


def test_a_part_that_the_user_put_in_eval_mode_stays_so_in_training():
    model = net()
    model[1].eval()
    model[2][1].eval()
    modes = modes_of(model)
    modes.eval()
    assert not any(states(model))
    modes.train()
    assert [part.training for part in (model, model[0], model[1], model[2], model[2][0], model[2][1])] == [
        *(True, True, False),
        *(True, True, False),
    ]


def test_a_model_that_came_in_eval_mode_is_trained_whole():
    model = net().eval()
    modes_of(model).train()
    assert all(states(model))


def test_what_stands_beside_the_model_is_in_training_as_it_came_and_scores_in_eval_mode():
    loss, before, metric = nn.CrossEntropyLoss(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()), nn.L1Loss()
    before[0].eval()
    modes = modes_of(net(), loss=loss, preprocess=before, augment=lambda x: before(x), metrics={"m": metric})
    modes.eval()
    assert not any([*states(loss), *states(before)])
    assert metric.training
    modes.train()
    assert states(before) == [True, False, True]
    assert loss.training
