"""What a model brings along, without the packages that such models come from; those are under tests/extras."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from twin import deal, run, schema_of

from sparkdeep.data.batches import Batch
from sparkdeep.errors import ConfigError
from sparkdeep.models.building import OwnLoss, adopt, build_model, may_bring_loss, may_bring_optimizer, own_parts
from sparkdeep.models.keras import choose_keras_backend
from sparkdeep.models.losses import LossFunction
from sparkdeep.models.prediction import Prediction
from sparkdeep.models.program import Program

SGD = partial(torch.optim.SGD, lr=0.1)


class Scores(nn.Module):
    """As transformers' models: logits, and a loss where labels are given."""

    def __init__(self, keep_loss=True):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.keep_loss = keep_loss

    def forward(self, x, labels=None):
        logits = self.linear(x)
        loss = None if labels is None or not self.keep_loss else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def batch(**labels):
    torch.manual_seed(0)
    return Batch(features=torch.randn(6, 4), weights=None, rows=6, labels=labels.get("labels", torch.arange(6) % 3))


def test_a_model_with_labels_brings_its_loss():
    model = Scores()
    step, optimizer = own_parts(model, loss=None, training_step=None, optimizer=SGD, weighted=False)
    given = batch()
    expected = nn.functional.cross_entropy(model.linear(given.features), given.labels)
    assert optimizer is SGD
    assert torch.equal(step(model, given), expected)
    assert torch.equal(step(model, batch(labels={"labels": given.labels})), expected)
    named = Batch(features={"x": given.features}, labels=given.labels, weights=None, rows=6)
    assert torch.equal(step(model, named), expected)


def test_a_torch_loss_is_given_the_logits(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    y = np.arange(20) % 3
    trained = []
    for loss, step in ((nn.CrossEntropyLoss(), None), (None, OwnLoss())):
        torch.manual_seed(0)
        program = Program(model=Scores(), loss=loss, training_step=step, optimizer=SGD)
        options = {"epochs": 2, "batch_size": 8, "sync_every": 2}
        model, _, _ = run(tmp_path, program, deal(x, y, [20]), schema_of(x, y), **options)
        trained.append(model.linear.weight)
    assert torch.equal(*trained)
    other = {"scores": torch.zeros(6, 3, requires_grad=True)}
    with pytest.raises(TypeError):
        LossFunction(program_with(nn.CrossEntropyLoss()), weighted=False).of_output(other, batch())


def program_with(loss):
    return Program(model=Scores(), loss=loss, optimizer=SGD)


def test_predictions_are_made_of_the_logits():
    output = Scores()(torch.randn(6, 4))
    assert Prediction.of("argmax", output, rows=6).apply(output).tolist() == output["logits"].argmax(1).tolist()
    assert Prediction.of(lambda whole: whole["logits"][:, 0], output, rows=6).sql_type == "float"
    with pytest.raises(ConfigError, match=r"logits of shape \(2, 5, 7\)"):
        Prediction.of("argmax", {"logits": torch.zeros(2, 5, 7)})


@pytest.mark.parametrize(
    ("model", "weighted", "said"),
    [
        (nn.Linear(4, 3), False, "give loss="),
        (Scores(), True, "weight_col with the loss that Scores computes itself"),
    ],
)
def test_what_a_model_does_not_bring_is_asked_for(model, weighted, said):
    with pytest.raises(ConfigError, match=said):
        own_parts(model, loss=None, training_step=None, optimizer=SGD, weighted=weighted)


def test_no_optimizer_and_no_loss_of_its_own_are_named():
    with pytest.raises(ConfigError, match="give optimizer="):
        own_parts(nn.Linear(4, 3), loss=nn.MSELoss(), training_step=None, optimizer=None, weighted=False)
    with pytest.raises(ConfigError, match=r"Scores computed no loss .* its output has \['loss', 'logits'\]"):
        OwnLoss()(Scores(keep_loss=False), batch())


def test_what_is_given_is_kept():
    step = OwnLoss()
    assert own_parts(nn.Linear(4, 3), loss=None, training_step=step, optimizer=SGD, weighted=False) == (step, SGD)
    model = nn.Linear(4, 3)
    assert adopt(model) is model


def test_only_building_tells_what_a_factory_brings():
    assert may_bring_loss("package:factory")
    assert may_bring_optimizer(lambda: None)
    assert may_bring_loss(Scores)
    assert may_bring_loss(Scores())
    assert not may_bring_loss(nn.Linear)
    assert not may_bring_optimizer(Scores())


def test_a_keras_model_on_another_backend_is_refused_before_it_is_called(monkeypatch):
    layer = type("Layer", (), {"__module__": "keras.src.layers.layer"})
    monkeypatch.setitem(sys.modules, "keras", SimpleNamespace())
    with pytest.raises(ConfigError, match="KERAS_BACKEND=torch in the environment before"):
        build_model(type("Sequential", (layer,), {})(), {}, 0)


def test_a_backend_that_was_chosen_otherwise_is_refused(monkeypatch):
    keras = SimpleNamespace(backend=SimpleNamespace(backend=lambda: "jax"))
    monkeypatch.setitem(sys.modules, "keras", keras)
    with pytest.raises(ConfigError, match=r"backend 'jax'.*spark.executorEnv.KERAS_BACKEND=torch"):
        choose_keras_backend("torch")
    choose_keras_backend("jax")
