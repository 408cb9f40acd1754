"""What is exported runs without sparkdeep, on any number of rows, and gives what the network gives."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

from sparkdeep.errors import ConfigError
from sparkdeep.models.export import exported
from sparkdeep.models.program import Program


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
        )

    def forward(self, pixels):
        return self.layers(pixels.reshape(-1, 1, 4, 4))


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.kind = nn.Embedding(5, 4)
        self.head = nn.Linear(6, 2)

    def forward(self, numbers, kind):
        return self.head(torch.cat([numbers, self.kind(kind)], 1))


class Standardize(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.arange(16.0))

    def forward(self, features):
        return (features - self.mean) / 3


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.weight if x.sum() > 0 else x


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(3, 16) + 1


def program(model, preprocess=None):
    return Program(model=model, loss=None, optimizer=torch.optim.SGD, preprocess=preprocess)


def scaled(features):
    return features / 16


def doubled(features):
    return {name: value * 2 for name, value in features.items()}


def untraceable(features):
    return torch.from_numpy(features.numpy() / 16)


def loaded(content):
    return torch.export.load(io.BytesIO(content)).module()


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("preprocess", [None, scaled, Standardize()], ids=["none", "function", "module"])
def test_a_program_gives_the_networks_output_for_any_number_of_rows(rows, preprocess):
    torch.manual_seed(0)
    model = Convolutional()
    model(torch.randn(32, 16))  # BatchNorm statistics that are not those of a new module
    again = loaded(exported(program(model, preprocess), torch.zeros(3, 16)))
    x = torch.randn(rows, 16) * 5
    with torch.no_grad():
        expected = model.eval()(x if preprocess is None else preprocess(x))
        torch.testing.assert_close(again(x), expected)
        other = model(x + 1 if preprocess is None else preprocess(x + 1))
    assert not torch.allclose(again(x), other)


def test_named_arguments_stay_named():
    model = Towers().eval()
    zeros = {"numbers": torch.zeros(3, 2), "kind": torch.zeros(3, dtype=torch.int64)}
    columns = {"numbers": torch.randn(5, 2), "kind": torch.tensor([0, 1, 2, 3, 4])}
    with torch.no_grad():
        torch.testing.assert_close(loaded(exported(program(model), zeros))(**columns), model(**columns))
        again = loaded(exported(program(model, lambda x: {**x, "numbers": x["numbers"] * 2}), zeros))
        expected = model(columns["numbers"] * 2, columns["kind"])
        torch.testing.assert_close(again(columns), expected)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, words):
        return self.head(self.embedding(words).mean(1))


def test_what_was_ragged_may_have_any_length():
    model = Words().eval()
    zeros = torch.zeros(3, 4, dtype=torch.int64)
    words = torch.arange(14).reshape(2, 7) % 9
    with torch.no_grad():
        torch.testing.assert_close(loaded(exported(program(model), zeros, ragged=[None]))(words), model(words))
    with pytest.raises((AssertionError, RuntimeError, ValueError)):  # without the word it has the length that was shown
        loaded(exported(program(model), zeros))(words)


@pytest.mark.parametrize(
    ("model", "preprocess", "why"),
    [
        (Branching(), None, r"(?s)GuardOnDataDependentSymNode|data.dependent"),
        (Fixed(), None, r"rows"),
        (Convolutional(), untraceable, r"(?i)numpy"),
    ],
    ids=["branch", "rows", "numpy"],
)
def test_what_torch_cannot_export_is_refused_with_its_reason(model, preprocess, why):
    with pytest.raises(ConfigError, match=why) as caught:
        exported(program(model, preprocess), torch.zeros(3, 16))
    assert "cannot be exported as 'torch'" in str(caught.value)
    assert "write forward and preprocess with torch's own operations" in str(caught.value)


def test_an_unknown_format_and_a_missing_package_are_named(monkeypatch):
    with pytest.raises(ConfigError, match=r"format='tensorrt': must be one of \['torch', 'onnx'\]"):
        exported(program(Fixed()), torch.zeros(3, 16), "tensorrt")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"needs the package 'onnx'.*pip install 'sparkdeep\[onnx\]'"):
        exported(program(Fixed()), torch.zeros(3, 16), "onnx")
