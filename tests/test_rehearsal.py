"""What does not fit is said before anything trains, with shapes, dtypes and a remedy."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from twin import schema_of

from sparkdeep.errors import ConfigError, UserCodeError
from sparkdeep.parameters import float_dtype_of
from sparkdeep.program import Program
from sparkdeep.rehearsal import build_model, materialize, rehearse, sample_batch


def rehearsed(model, loss, x, y=None, w=None, **parts):
    program = Program(model=model, loss=loss, optimizer=partial(torch.optim.SGD, lr=0.1), **parts)
    schema = schema_of(x, y, w)
    fields = {name: a for name, a in (("features", x), ("label", y), ("weight", w)) if a is not None}
    return rehearse(program, sample_batch(fields, schema, program), schema)


X = np.ones((4, 3), np.float32)
COLUMN, CLASSES = np.ones((4, 1), np.float32), np.array([0, 1, 1, 0])


def test_a_program_that_fits_gives_its_output_and_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    before, stream = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    output = rehearsed(model, nn.CrossEntropyLoss(), X, CLASSES)
    assert output.shape == (4, 2)
    assert not output.requires_grad
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), stream)


def test_integer_features_into_a_dense_layer_say_how_to_cast():
    with pytest.raises(ConfigError, match=r"cannot take integer features.*int64 \(4, 3\).*array<float>") as caught:
        rehearsed(nn.Linear(3, 2), nn.CrossEntropyLoss(), np.ones((4, 3), np.int64), CLASSES)
    assert "labels int64 (4,)" in str(caught.value)


def test_a_layer_of_another_width_gives_the_users_traceback_and_the_shapes():
    with pytest.raises(UserCodeError, match=r"^Traceback") as caught:
        rehearsed(nn.Linear(5, 2), nn.CrossEntropyLoss(), X, CLASSES)
    assert "the model raised RuntimeError on the first ingested rows: features float32 (4, 3)" in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "outputs", "labels", "remedy"),
    [
        (nn.CrossEntropyLoss(), 2, np.ones(4, np.float32), r"needs integer labels.*cast\('long'\)"),
        (nn.BCEWithLogitsLoss(), 1, CLASSES, r"needs floating-point labels.*cast\('float'\)"),
        (nn.CrossEntropyLoss(), 2, None, r"No label_cols was given"),
    ],
    ids=["classes", "numbers", "none"],
)
def test_labels_of_the_wrong_kind_say_how_to_cast(loss, outputs, labels, remedy):
    with pytest.raises(ConfigError, match=rf"(?s)the loss cannot take this model's output.*{remedy}"):
        rehearsed(nn.Linear(3, outputs), loss, X, labels)


def test_a_loss_that_would_broadcast_is_refused_and_the_usual_case_is_aligned():
    with pytest.raises(ConfigError, match=r"the loss would broadcast.*float32 \(4, 2\).*label_cols="):
        rehearsed(nn.Linear(3, 2), nn.MSELoss(), X, COLUMN)
    rehearsed(nn.Linear(3, 1), nn.MSELoss(), X, COLUMN[:, 0].copy())


def test_a_loss_a_row_or_one_without_gradient_is_refused():
    with pytest.raises(ConfigError, match=r"one number a batch \(reduction='mean'\), got float32 \(4, 1\)"):
        rehearsed(nn.Linear(3, 1), lambda o, y: (o - y).square(), X, COLUMN)
    with pytest.raises(ConfigError, match="does not depend on any trainable parameter"):
        rehearsed(nn.Linear(3, 1), lambda o, y: (o.detach() - y).square().mean(), X, COLUMN)


def test_a_weight_column_needs_a_loss_that_can_use_it():
    weights = np.ones(4, np.float32)
    rehearsed(nn.Linear(3, 1), nn.MSELoss(), X, COLUMN, weights)
    with pytest.raises(ConfigError, match="weight_col needs a loss per row"):
        rehearsed(nn.Linear(3, 1), lambda o, y: (o - y).square().mean(), X, COLUMN, weights)


class Contrast(nn.Module):
    """A loss that is no mean over rows, and so no mean under weights of one either."""

    reduction = "mean"

    def forward(self, output, label):
        losses = (output - label).square()
        return losses if self.reduction == "none" else losses.mean().sqrt()


def test_a_weight_column_that_would_change_the_loss_itself_is_refused_with_both_numbers():
    weights, model = np.full(4, 2.0, np.float32), nn.Linear(3, 1)
    nn.init.constant_(model.weight, 1.0)
    nn.init.zeros_(model.bias)
    with pytest.raises(
        ConfigError, match=r"1 for every row it is 4, without weights 2, .*loss\(output, label, weight\)"
    ):
        rehearsed(model, Contrast(), X, COLUMN, weights)
    rehearsed(model, Contrast(), X, COLUMN)
    rehearsed(model, nn.MSELoss(), X, COLUMN, weights)


def broken(_output, _label):
    raise IndexError("no such class")


@pytest.mark.parametrize(
    ("metric", "complaint"),
    [
        (broken, r"(?s)^Traceback.*metric 'm' raised IndexError: no such class for output float32 \(4, 2\)"),
        (lambda o, y: o, r"(?s)metric 'm' raised .*it must return one number"),
        (torchmetrics.Accuracy(task="multiclass", num_classes=5), r"(?s)metric 'm' raised ValueError"),
    ],
    ids=["raises", "rows", "classes"],
)
def test_a_metric_that_cannot_score_the_first_rows_is_refused(metric, complaint):
    with pytest.raises(UserCodeError, match=complaint):
        rehearsed(nn.Linear(3, 2), nn.CrossEntropyLoss(), X, CLASSES, metrics={"m": metric})


def test_metrics_that_fit_pass_and_keep_no_state():
    metric = torchmetrics.Accuracy(task="multiclass", num_classes=2)
    rehearsed(nn.Linear(3, 2), nn.CrossEntropyLoss(), X, CLASSES, metrics={"m": metric, "f": lambda o, y: 1.0})
    assert metric.update_count == 0


# -- making the model ---------------------------------------------------------------------------------------------------


def test_a_class_is_built_from_the_seed_and_leaves_the_stream_alone():
    stream = torch.get_rng_state()
    first, again, other = (build_model(nn.Linear, {"in_features": 2, "out_features": 2}, s) for s in (1, 1, 2))
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert torch.equal(torch.get_rng_state(), stream)


def test_a_module_is_copied_and_takes_no_arguments():
    given = nn.Linear(2, 2)
    made = build_model(given, {}, 0)
    assert made is not given
    assert torch.equal(made.weight, given.weight)
    with pytest.raises(ConfigError, match=r"model_args=\{'a': 1\} with a model that is built already; give the class"):
        build_model(given, {"a": 1}, 0)


def test_a_factory_of_something_else_is_refused():
    with pytest.raises(ConfigError, match=r"returned int; it must be an nn\.Module, a class of one"):
        build_model(lambda: 3, {}, 0)


def test_lazy_parameters_get_their_shapes_from_the_first_rows_and_the_seed():
    def made(seed):
        model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(1))
        program = Program(model=model, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
        schema = schema_of(X, COLUMN)
        materialize(model, sample_batch({"features": X, "label": COLUMN}, schema, program), seed)
        return model

    model = made(0)
    assert model[0].weight.shape == (4, 3)
    assert model.training
    assert model[1].num_batches_tracked == 0
    assert torch.equal(model[0].weight, made(0)[0].weight)
    assert not torch.equal(model[0].weight, made(1)[0].weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_inputs_follow_the_dtype_of_the_models_first_floating_parameter(dtype):
    model = nn.Linear(3, 1).to(dtype)
    assert float_dtype_of(model) == dtype
    assert float_dtype_of(nn.ReLU()) == torch.float32
    assert rehearsed(model, nn.MSELoss(), X, COLUMN).dtype == dtype


def test_preprocess_comes_before_the_model():
    assert rehearsed(nn.Linear(6, 1), nn.MSELoss(), X, COLUMN, preprocess=lambda x: x.repeat(1, 2)).shape == (4, 1)
