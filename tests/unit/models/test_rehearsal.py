"""What does not fit is said before anything trains, with shapes, dtypes and a remedy."""

from __future__ import annotations

import copy
import threading
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from twin import schema_of

from sparkdeep.errors import ConfigError, UserCodeError
from sparkdeep.models.building import build_model
from sparkdeep.models.packing import copied, pack_program, unpack_program
from sparkdeep.models.program import Program
from sparkdeep.models.rehearsal import materialize, rehearse, sample_batch
from sparkdeep.tensors.parameters import float_dtype_of, named_tensors


def rehearsed(model, loss, x, y=None, w=None, **parts):
    program = Program(model=model, loss=loss, **{"optimizer": partial(torch.optim.SGD, lr=0.1), **parts})
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


def test_parts_of_a_loss_that_divide_by_different_counts_are_told_once_before_training(caplog):
    some = np.array([0, 1, -100, 0])
    weights = torch.tensor([1.0, 3.0])

    def both(output, label):
        return nn.functional.cross_entropy(output, label, weight=weights) + nn.functional.cross_entropy(output, label)

    rehearsed(nn.Linear(3, 2), nn.functional.cross_entropy, X, some)
    assert caplog.text == ""
    rehearsed(nn.Linear(3, 2), both, X, some)
    assert "the loss has parts that torch divides by different counts" in caplog.text
    assert "return (sum, count)" in caplog.text


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


ROWS = 7
XS = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
FLAT = XS[:, 0].copy()


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: (o - y).square().mean(),
        lambda o, y: (y - o).abs().mean(),
        lambda o, y: (o * (2 * y - 1)).neg().exp().mean(),
        lambda o, y: torch.mean(torch.square(torch.sub(y.float(), o))),
        lambda o, y: (o / torch.stack([y, y]).sum(0)).mean(),
    ],
    ids=["output-label", "label-output", "product", "functions", "through-a-list"],
)
def test_a_loss_of_the_users_that_broadcasts_in_silence_is_refused(loss):
    with pytest.raises(ConfigError, match=r"the loss would broadcast.*output float32 \(7, 1\).*labels float32 \(7,\)"):
        rehearsed(nn.Linear(3, 1), loss, XS, FLAT)
    rehearsed(nn.Linear(3, 1), loss, XS, FLAT[:, None].copy())


def contrastive(output, label):
    near = (label[:, None] - label).abs() < 0.5
    distances = (output - output.squeeze(1)).square()
    return (distances * near).mean() + (distances.sum(1) * near.sum(1)).mean()


def test_all_pairs_of_rows_are_what_a_contrastive_loss_means():
    rehearsed(nn.Linear(3, 1), contrastive, XS, FLAT)


def test_a_training_step_may_broadcast_as_it_likes():
    def step(model, batch):
        output = model(batch.features)
        return (output - batch.labels).square().mean() + (output[:, :1] * batch.labels).mean()

    rehearsed(nn.Linear(3, 1), None, XS, FLAT, training_step=step)
    rehearsed(nn.Linear(3, ROWS), None, XS, FLAT, training_step=step)
    rehearsed(nn.Linear(3, ROWS), nn.CrossEntropyLoss(), XS, np.arange(ROWS))


class Squeezed(nn.Linear):
    def forward(self, x):
        return super().forward(x).squeeze()


class SqueezedLast(nn.Linear):
    def forward(self, x):
        return super().forward(x).squeeze(-1)


class TwoRows(nn.Linear):
    def forward(self, x):
        assert len(x) > 1, "no pair"
        return super().forward(x)


def test_an_output_that_loses_its_row_in_a_batch_of_one_is_refused_and_squeeze_is_named():
    remedy = r"for one row is float32 \(\), for 7 rows float32 \(7,\).*as \.squeeze\(\) does.*\.squeeze\(-1\)"
    with pytest.raises(ConfigError, match=remedy):
        rehearsed(Squeezed(3, 1), nn.MSELoss(), XS, FLAT)
    rehearsed(SqueezedLast(3, 1), nn.MSELoss(), XS, FLAT)


def test_a_model_that_cannot_take_one_row_gives_the_users_traceback():
    with pytest.raises(UserCodeError, match=r"(?s)^Traceback.*AssertionError on a batch of one row"):
        rehearsed(TwoRows(3, 1), nn.MSELoss(), XS, FLAT)
    step = {"training_step": lambda model, batch: model(batch.features).mean()}
    assert rehearsed(TwoRows(3, 1), None, XS, FLAT, **step).shape == (ROWS, 1)


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ({"optimizer": partial(torch.optim.SGD, learning_rate=0.1)}, "unexpected keyword argument 'learning_rate'"),
        ({"optimizer": partial(torch.optim.AdamW, lr=-1.0)}, "Invalid learning rate: -1.0"),
        ({"optimizer": lambda parameters: parameters}, "optimizer returned list; give a callable"),
        ({"lr_scheduler": torch.optim.lr_scheduler.StepLR}, "'step_size'"),
        ({"lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, "'metrics'"),
        ({"lr_scheduler": lambda optimizer: optimizer.param_groups}, "no attribute 'step'"),
    ],
    ids=["keyword", "value", "no-optimizer", "argument", "plateau", "no-scheduler"],
)
def test_an_optimizer_or_scheduler_that_cannot_be_made_is_refused_with_the_exception(parts, complaint):
    with pytest.raises(ConfigError, match=complaint):
        rehearsed(nn.Linear(3, 1), nn.MSELoss(), X, COLUMN, **parts)


MADE: list = []


def noted_sgd(parameters):
    MADE.extend(parameters)
    return torch.optim.SGD(parameters, lr=0.1)


def test_optimizer_and_scheduler_are_tried_on_a_copy():
    model = nn.Linear(3, 1)
    MADE.clear()
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    rehearsed(model, nn.MSELoss(), X, COLUMN, optimizer=noted_sgd, lr_scheduler=schedule)
    assert [p.shape for p in MADE] == [(1, 3), (1,)]
    assert not {id(p) for p in MADE} & {id(p) for p in model.parameters()}
    assert model.weight.grad is None


class Running(nn.Module):
    """A loss that keeps a buffer, a count and a record of what it saw."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(1))
        self.calls, self.seen = 0, []

    def forward(self, output, label):
        self.calls += 1
        self.seen.append(float(output.detach().mean()))
        self.center.add_(1)
        return (output - label - self.center).square().mean()


def test_the_users_own_objects_are_left_as_they_were():
    model, loss = nn.Linear(3, 1), Running()
    rehearsed(model, loss, X, COLUMN)
    assert (loss.calls, loss.seen, loss.center.item()) == (0, [], 0)


class Centers(nn.Module):
    def __init__(self):
        super().__init__()
        self.centers = nn.Parameter(torch.zeros(1))

    def forward(self, output, label):
        return (output - label - self.centers).square().mean()


class Penalized(nn.Module):
    """A loss that holds the model: its parameters are trained."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, output, label):
        return (output - label).square().mean() + self.model.weight.square().sum()


def test_a_loss_with_parameters_of_its_own_is_refused_by_name():
    with pytest.raises(
        ConfigError,
        match=r"loss= holds 1 trainable parameters that are not the model's \(shapes \(.*\)\) and would not be",
    ):
        rehearsed(nn.Linear(3, 1), Centers(), X, COLUMN)
    rehearsed(nn.Linear(3, 1), Centers().requires_grad_(False), X, COLUMN)
    model = nn.Linear(3, 1)
    rehearsed(model, Penalized(model), X, COLUMN)


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


def test_a_module_takes_no_arguments():
    given = nn.Linear(2, 2)
    assert build_model(given, {}, 0) is given
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


@pytest.mark.parametrize(
    ("x", "error", "complaint"),
    [
        (np.ones((4, 3), np.int64), ConfigError, r"cannot take integer features"),
        (np.ones((4, 3, 2, 2, 2), np.float32), UserCodeError, r"^Traceback(.|\n)*on the first ingested rows: features"),
    ],
    ids=["integers", "shape"],
)
def test_what_a_lazy_module_cannot_take_is_said_as_for_any_other(x, error, complaint):
    model = nn.Sequential(nn.LazyConv1d(2, 1) if x.ndim > 2 else nn.LazyLinear(2))
    program = Program(model=model, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    with pytest.raises(error, match=complaint):
        materialize(model, sample_batch({"features": x}, schema_of(x), program), 0)


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LazyLinear(2), nn.LazyLinear(2)

    def forward(self, x):
        return self.first(x)


def test_a_lazy_layer_that_forward_does_not_reach_is_named():
    model = build_model(Unreached(), {}, 0)
    program = Program(model=model, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    with pytest.raises(ConfigError, match=r"lazy parameter 'second\.weight' has no shape yet"):
        materialize(model, sample_batch({"features": X}, schema_of(X), program), 0)


def weight_normed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 1))


@pytest.mark.parametrize(
    "made",
    [
        lambda: nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d(), nn.LazyLinear(1)),
        weight_normed,
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 1))),
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 1))),
    ],
    ids=["lazy", "weight_norm", "parametrized", "spectral_norm"],
)
def test_modules_that_deepcopy_alone_may_refuse_are_copied_rehearsed_and_sent(made):
    given = made()
    program = copied(Program(model=given, loss=nn.MSELoss(), optimizer=partial(torch.optim.SGD, lr=0.1)))
    model = program.model
    assert model is not given
    schema = schema_of(X, COLUMN)
    batch = sample_batch({"features": X, "label": COLUMN}, schema, program)
    materialize(model, batch, 0)
    output = rehearse(program, batch, schema)
    twin = unpack_program(pack_program(program)).model
    with torch.no_grad():
        for (name, ours), (other, theirs) in zip(named_tensors(model), named_tensors(twin), strict=True):
            assert name == other
            theirs.copy_(ours)
    torch.testing.assert_close(twin.eval()(batch.features), output)
    own = {id(t) for _, t in named_tensors(given)}
    assert not any(id(t) in own for _, t in named_tensors(model))


@pytest.mark.parametrize("kind", [nn.Linear, partial(nn.LazyBatchNorm1d, affine=False)])
def test_a_module_that_cannot_be_copied_names_the_attribute(kind):
    model = kind(2, 2) if kind is nn.Linear else kind()
    model.lock = threading.Lock()
    with pytest.raises(ConfigError, match=r"^model\.lock cannot be pickled"):
        copied(Program(model=model, loss=None, optimizer=torch.optim.SGD))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_inputs_follow_the_dtype_of_the_models_first_floating_parameter(dtype):
    model = nn.Linear(3, 1).to(dtype)
    assert float_dtype_of(model) == dtype
    assert float_dtype_of(nn.ReLU()) == torch.float32
    assert rehearsed(model, nn.MSELoss(), X, COLUMN).dtype == dtype


def test_preprocess_comes_before_the_model():
    assert rehearsed(nn.Linear(6, 1), nn.MSELoss(), X, COLUMN, preprocess=lambda x: x.repeat(1, 2)).shape == (4, 1)
