"""The loss of a batch: rows, weights, and the shapes people trip over."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparkdeep.data.batches import Batch
from sparkdeep.errors import ConfigError
from sparkdeep.losses import LossFunction, forward
from sparkdeep.program import Program


def loss_of(loss, *, weighted=False, step=None):
    program = Program(model=nn.Linear(2, 1), loss=loss, optimizer=torch.optim.SGD, training_step=step)
    return LossFunction(program, weighted=weighted)


def batch(labels, weights=None, rows=None):
    return Batch(features=torch.zeros(len(labels), 2), labels=labels, weights=weights, rows=rows or len(labels))


OUTPUT = torch.tensor([[1.0], [2.0], [4.0]])
LABELS = torch.tensor([1.0, 0.0, 0.0])


@pytest.mark.parametrize("kind", [nn.MSELoss(), nn.L1Loss(), nn.BCEWithLogitsLoss(), nn.SmoothL1Loss()], ids=repr)
def test_an_output_of_one_column_meets_labels_without_it(kind):
    got = loss_of(kind).of_output(OUTPUT, batch(LABELS))
    assert got == kind(OUTPUT, LABELS[:, None])
    assert got == loss_of(kind).of_output(OUTPUT, batch(LABELS[:, None]))


def test_without_the_alignment_the_loss_would_be_another_number():
    with pytest.warns(UserWarning, match="target size"):
        broadcast = nn.MSELoss()(OUTPUT, LABELS)
    assert broadcast != loss_of(nn.MSELoss()).of_output(OUTPUT, batch(LABELS))


def test_whole_labels_and_wider_outputs_are_left_alone():
    logits, classes = torch.randn(3, 4), torch.tensor([0, 3, 1])
    assert loss_of(nn.CrossEntropyLoss()).of_output(logits, batch(classes)) == F.cross_entropy(logits, classes)
    seen = []
    loss_of(lambda output, label: seen.append(label.shape)).of_output(OUTPUT, batch(LABELS))
    assert seen == [(3,)], "a callable of the user's gets what the columns hold"


WEIGHTS = torch.tensor([1.0, 0.0, 3.0])


def test_row_weights_give_the_weighted_mean_of_row_losses():
    got = loss_of(nn.MSELoss(), weighted=True).of_output(OUTPUT, batch(LABELS, WEIGHTS))
    assert got.item() == pytest.approx((0 * 1 + 16 * 3) / 4)
    wide, targets = torch.randn(3, 5), torch.randn(3, 5)
    got = loss_of(nn.MSELoss(), weighted=True).of_output(wide, batch(targets, WEIGHTS))
    rows = (wide - targets).square().mean(1)
    assert got.item() == pytest.approx(((rows * WEIGHTS).sum() / 4).item())


def test_weights_of_one_are_no_weights():
    ones = torch.ones(3)
    got = loss_of(nn.MSELoss(), weighted=True).of_output(OUTPUT, batch(LABELS, ones))
    torch.testing.assert_close(got, loss_of(nn.MSELoss()).of_output(OUTPUT, batch(LABELS)))


def test_a_batch_of_zero_weights_teaches_nothing_and_is_not_nan():
    output = OUTPUT.clone().requires_grad_()
    loss = loss_of(nn.MSELoss(), weighted=True).of_output(output, batch(LABELS, torch.zeros(3)))
    loss.backward()
    assert loss == 0
    assert output.grad.tolist() == [[0.0], [0.0], [0.0]]


def test_a_callable_that_takes_weight_is_given_the_weights_and_others_are_refused():
    got = loss_of(lambda o, y, weight: weight.sum(), weighted=True).of_output(OUTPUT, batch(LABELS, WEIGHTS))
    assert got == 4
    with pytest.raises(ConfigError, match=r"weight_col needs a loss per row.*loss\(output, label, weight\)"):
        loss_of(lambda o, y: 0, weighted=True)


def test_the_users_loss_module_is_not_changed_by_weights():
    kind = nn.MSELoss()
    loss_of(kind, weighted=True)
    assert kind.reduction == "mean"


def test_a_training_step_takes_the_place_of_the_loss():
    step = loss_of(None, step=lambda model, given: given.labels.sum(), weighted=True)
    assert step(nn.Linear(2, 1), batch(LABELS, WEIGHTS)) == 1


def test_named_columns_become_named_arguments():
    class Two(nn.Module):
        def forward(self, left, right):
            return left - right

    assert forward(Two(), {"right": torch.ones(1), "left": torch.full((1,), 3.0)}) == 2
    assert forward(nn.Identity(), torch.ones(1)) == 1
