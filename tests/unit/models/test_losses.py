"""The loss of a batch: rows, weights, and the shapes people trip over."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparkdeep.data.batches import Batch
from sparkdeep.errors import ConfigError
from sparkdeep.models.losses import LossFunction, forward
from sparkdeep.models.program import Program


def loss_of(loss, *, weighted=False, step=None):
    program = Program(model=nn.Linear(2, 1), loss=loss, optimizer=torch.optim.SGD, training_step=step)
    return LossFunction(program, weighted=weighted)


def batch(labels, weights=None, rows=None):
    return Batch(features=torch.zeros(len(labels), 2), labels=labels, weights=weights, rows=rows or len(labels))


OUTPUT = torch.tensor([[1.0], [2.0], [4.0]])
LABELS = torch.tensor([1.0, 0.0, 0.0])


@pytest.mark.parametrize("kind", [nn.MSELoss(), nn.L1Loss(), nn.BCEWithLogitsLoss(), nn.SmoothL1Loss()], ids=repr)
def test_an_output_of_one_column_meets_labels_without_it(kind):
    got = loss_of(kind).of_output(OUTPUT, batch(LABELS)).mean
    assert got == kind(OUTPUT, LABELS[:, None])
    assert got == loss_of(kind).of_output(OUTPUT, batch(LABELS[:, None])).mean


def test_without_the_alignment_the_loss_would_be_another_number():
    with pytest.warns(UserWarning, match="target size"):
        broadcast = nn.MSELoss()(OUTPUT, LABELS)
    assert broadcast != loss_of(nn.MSELoss()).of_output(OUTPUT, batch(LABELS)).mean


def test_whole_labels_and_wider_outputs_are_left_alone():
    logits, classes = torch.randn(3, 4), torch.tensor([0, 3, 1])
    assert loss_of(nn.CrossEntropyLoss()).of_output(logits, batch(classes)).mean == F.cross_entropy(logits, classes)
    seen = []
    loss_of(lambda output, label: seen.append(label.shape)).of_output(OUTPUT, batch(LABELS))
    assert seen == [(3,)], "a callable of the user's gets what the columns hold"


WEIGHTS = torch.tensor([1.0, 0.0, 3.0])


def test_row_weights_give_the_weighted_mean_of_row_losses():
    got = loss_of(nn.MSELoss(), weighted=True).of_output(OUTPUT, batch(LABELS, WEIGHTS)).mean
    assert got.item() == pytest.approx((0 * 1 + 16 * 3) / 4)
    wide, targets = torch.randn(3, 5), torch.randn(3, 5)
    got = loss_of(nn.MSELoss(), weighted=True).of_output(wide, batch(targets, WEIGHTS)).mean
    rows = (wide - targets).square().mean(1)
    assert got.item() == pytest.approx(((rows * WEIGHTS).sum() / 4).item())


def test_weights_of_one_are_no_weights():
    ones = torch.ones(3)
    got = loss_of(nn.MSELoss(), weighted=True).of_output(OUTPUT, batch(LABELS, ones)).mean
    torch.testing.assert_close(got, loss_of(nn.MSELoss()).of_output(OUTPUT, batch(LABELS)).mean)


LOGITS = torch.tensor([[0.2, -1.0, 0.5], [1.5, 0.1, 0.3], [0.0, 0.4, -0.7], [2.0, -2.0, 0.0]])
CLASSES = torch.tensor([0, 2, 1, 2])
CLASS_WEIGHTS = torch.tensor([1.0, 5.0, 0.5])
SEQUENCE = torch.linspace(-2, 3, 4 * 3 * 5).reshape(4, 3, 5).sin()
STEPS = torch.tensor([[0, 1, 2, -100, 1], [2, 2, -100, -100, -100], [1, 0, 1, 0, 1], [-100, 2, 0, 1, 2]])
PROBABILITIES = LOGITS.flip(0).softmax(1)

MEANS = [
    (nn.CrossEntropyLoss(), LOGITS, CLASSES),
    (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), LOGITS, CLASSES),
    (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), LOGITS, PROBABILITIES),
    (nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.1), LOGITS, CLASSES),
    (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=1, label_smoothing=0.2), LOGITS, CLASSES),
    (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), SEQUENCE, STEPS),
    (nn.CrossEntropyLoss(), SEQUENCE, STEPS),
    (nn.NLLLoss(weight=CLASS_WEIGHTS, ignore_index=0), LOGITS.log_softmax(1), CLASSES),
    (nn.NLLLoss(), SEQUENCE.log_softmax(1), STEPS),
    (nn.KLDivLoss(reduction="batchmean"), LOGITS.log_softmax(1), PROBABILITIES),
    (nn.KLDivLoss(), LOGITS.log_softmax(1), PROBABILITIES),
    (nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHTS), LOGITS, PROBABILITIES),
    (nn.MultiMarginLoss(weight=CLASS_WEIGHTS), LOGITS, CLASSES),
    (nn.MultiLabelSoftMarginLoss(), LOGITS, PROBABILITIES.round()),
    (nn.SmoothL1Loss(), SEQUENCE, SEQUENCE.flip(0)),
    (nn.PoissonNLLLoss(), LOGITS, PROBABILITIES),
]


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
@pytest.mark.parametrize(("kind", "output", "labels"), MEANS, ids=lambda v: repr(v) if isinstance(v, nn.Module) else "")
def test_weights_of_one_are_no_weights_in_every_loss_of_torch(kind, output, labels):
    weighted = loss_of(kind, weighted=True)
    torch.testing.assert_close(weighted.of_output(output, batch(labels, torch.ones(4))).mean, kind(output, labels))
    weighted.check_weights(output, batch(labels, torch.ones(4)))


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
@pytest.mark.parametrize(("kind", "output", "labels"), MEANS, ids=lambda v: repr(v) if isinstance(v, nn.Module) else "")
def test_a_whole_weight_is_as_many_copies_of_the_row_in_every_loss_of_torch(kind, output, labels):
    copies = torch.tensor([2, 1, 0, 3])
    got = loss_of(kind, weighted=True).of_output(output, batch(labels, copies.float())).mean
    torch.testing.assert_close(got, kind(output.repeat_interleave(copies, 0), labels.repeat_interleave(copies, 0)))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_loss_that_is_no_mean_is_refused(reduction, weighted):
    with pytest.raises(ConfigError, match=rf"reduction='{reduction}', but the loss must be one number .*training_step"):
        loss_of(nn.MSELoss(reduction=reduction), weighted=weighted)


@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss, partial(F.cross_entropy, ignore_index=0)])
def test_functions_of_torch_are_refused_under_weights_since_theirs_mean_something_else(loss):
    loss_of(loss)
    with pytest.raises(ConfigError, match=r"does not take a weight a row. Use the loss module"):
        loss_of(loss, weighted=True)


class Deaf(nn.Module):
    reduction = "mean"

    def forward(self, output, label):
        return (output - label).mean()


def test_a_loss_that_gives_no_loss_per_row_is_refused():
    with pytest.raises(ConfigError, match=r"reduction='none' gives shape \(\) for 3 rows"):
        loss_of(Deaf(), weighted=True).of_output(OUTPUT, batch(LABELS, WEIGHTS))


def test_a_loss_of_the_users_with_weights_is_held_to_its_own_value_without():
    def fair(output, label, weight=None):
        losses = (output[:, 0] - label).square()
        return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()

    def unfair(output, label, weight=None):
        losses = (output[:, 0] - label).square()
        return losses.mean() if weight is None else (losses * weight).sum()

    given = batch(LABELS, WEIGHTS)
    loss_of(fair, weighted=True).check_weights(OUTPUT, given)
    loss_of(lambda o, y, weight: weight.sum(), weighted=True).check_weights(OUTPUT, given)
    with pytest.raises(ConfigError, match=r"weight of 1 for every row it is 20, without weights 6\.66667"):
        loss_of(unfair, weighted=True).check_weights(OUTPUT, given)


def test_a_batch_of_zero_weights_teaches_nothing_and_is_not_nan():
    output = OUTPUT.clone().requires_grad_()
    loss = loss_of(nn.MSELoss(), weighted=True).of_output(output, batch(LABELS, torch.zeros(3))).mean
    loss.backward()
    assert loss == 0
    assert output.grad.tolist() == [[0.0], [0.0], [0.0]]


def test_a_callable_that_takes_weight_is_given_the_weights_and_others_are_refused():
    got = loss_of(lambda o, y, weight: weight.sum(), weighted=True).of_output(OUTPUT, batch(LABELS, WEIGHTS)).mean
    assert got == 4
    with pytest.raises(ConfigError, match=r"weight_col needs a loss per row.*loss\(output, label, weight\)"):
        loss_of(lambda o, y: 0, weighted=True)


def test_the_users_loss_module_is_not_changed_by_weights():
    kind = nn.MSELoss()
    loss_of(kind, weighted=True)
    assert kind.reduction == "mean"


def test_a_training_step_takes_the_place_of_the_loss():
    step = loss_of(None, step=lambda model, given: given.labels.sum(), weighted=True)
    assert step(nn.Linear(2, 1), batch(LABELS, WEIGHTS)).mean == 1


def test_named_columns_become_named_arguments():
    class Two(nn.Module):
        def forward(self, left, right):
            return left - right

    assert forward(Two(), {"right": torch.ones(1), "left": torch.full((1,), 3.0)}) == 2
    assert forward(nn.Identity(), torch.ones(1)) == 1
