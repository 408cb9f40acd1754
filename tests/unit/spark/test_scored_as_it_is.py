"""`transform` scores the model as it is: whatever was changed and however; and nothing that scores is in train mode."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from twin import schema_of

from sparkdeep.spark.model import model as spark_model
from sparkdeep.spark.model.scoring import _Loaded
from sparkdeep.tensors.parameters import content_mark

X = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
FEATURES = torch.from_numpy(X)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.scale, self.inner = nn.Linear(4, 1), 1.0, {"shift": 0.0}
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, x):
        return self.net(x) * self.scale + self.inner["shift"] + self.seen


@pytest.fixture(autouse=True)
def without_spark(monkeypatch):
    monkeypatch.setattr(spark_model, "carried", lambda spark, scorer: scorer)
    monkeypatch.setattr(spark_model, "access_to", lambda spark: SimpleNamespace(session=1))


def model_of(module, **more):
    return spark_model.TorchModel(module=module, schema=schema_of(X), **more)


def scored(model, rows=X):
    loaded = _Loaded(model._ship(None, model._task()))
    column = pa.array([row.tolist() for row in rows], pa.list_(pa.float32()))
    return torch.tensor(loaded.predict((column,)).to_pylist())


CHANGES = {
    "in place": lambda m: m.net.weight.detach().mul_(0.5),
    "past torch's count": lambda m: m.net.weight.data.mul_(0.5),
    "one element": lambda m: m.net.weight.data[0, 2].zero_(),
    "two elements change places": lambda m: m.net.weight.data.copy_(m.net.weight.data[:, [1, 0, 2, 3]]),
    "all of them from a vector": lambda m: nn.utils.vector_to_parameters(torch.full((5,), 5.0), m.parameters()),
    "from numpy": lambda m: m.net.bias.detach().numpy().fill(3.0),
    "an attribute": lambda m: setattr(m, "scale", 100.0),
    "inside an attribute": lambda m: m.inner.update(shift=7.0),
    "a buffer that is not saved": lambda m: m.seen.add_(1.0),
    "another layer": lambda m: setattr(m, "net", nn.Linear(4, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_is_sent_again(change):
    model = model_of(Scaled())
    before = scored(model)
    CHANGES[change](model.model)
    after = scored(model)
    torch.testing.assert_close(after, model.model.eval()(FEATURES).detach().flatten())
    assert not torch.equal(after, before)


def test_one_that_is_as_it_was_is_not():
    model = model_of(Scaled())
    first = model._ship(None, model._task())
    assert model._ship(None, model._task()) is first
    model.model.net.weight.data.copy_(model.model.net.weight.data.clone())
    assert model._ship(None, model._task()) is first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.complex64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 7, 600, 5000])
def test_content_marks_differ_with_every_element(dtype, size):
    tensor = (torch.arange(size) % 5).to(dtype)
    mark = content_mark([("t", tensor)])
    assert content_mark([("t", tensor.clone())]) == mark
    for place in {0, size // 2, size - 1}:
        other = tensor.clone()
        other[place] = not other[place] if dtype == torch.bool else other[place] + 1
        assert content_mark([("t", other)]) != mark
    assert content_mark([("u", tensor)]) != mark
    assert content_mark([("t", tensor[None])]) != mark


def test_unaligned_parts_of_a_tensor_have_marks_too():
    whole = torch.arange(9000.0)
    assert content_mark([("t", whole[1:8193])]) == content_mark([("t", whole[1:8193].clone())])


def test_a_preprocess_scores_in_eval_mode():
    norm = nn.BatchNorm1d(4, affine=False)
    norm.running_mean.fill_(1.0)
    net = Scaled().net
    exact = net(copy.deepcopy(norm).eval()(FEATURES)).detach().flatten()
    for rows in (2, 4, 12):
        got = scored(model_of(net, preprocess=copy.deepcopy(norm)), X[:rows])
        torch.testing.assert_close(got, exact[:rows])
    dropped = scored(model_of(net, preprocess=nn.Dropout(0.5)), X[:1].repeat(3, 0))
    assert len(set(dropped.tolist())) == 1


class Held:
    """A callable that holds a module."""

    def __init__(self):
        self.drop = nn.Dropout(0.5)

    def __call__(self, x):
        return self.drop(x)


def test_one_that_a_callable_holds_too():
    drop = nn.Dropout(0.5)
    for preprocess in (Held(), lambda x: drop(x), drop.forward):
        values = scored(model_of(Scaled().net, preprocess=preprocess), X[:1].repeat(8, 0))
        assert len(set(values.tolist())) == 1
