"""Settings as JSON: what can be stored comes back equal, what cannot is refused with a remedy, and nothing stored runs."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib

import numpy as np
import pytest
import torch
from torch import nn

from sparkdeep import QSR, Asynchronous, EarlyStopping, Scaffold, TrimmedMean, WarmStart, register
from sparkdeep.algorithms import diloco
from sparkdeep.errors import ConfigError, ModelLoadError
from sparkdeep.optim.local_work import LocalWork
from sparkdeep.spark.model.stored_values import NAMED_SETTINGS, from_json, named_value, to_json


class Linear3(nn.Linear):
    def __init__(self, width=3):
        super().__init__(width, 1)


@register
def registered_loss(output, label, scale=1.0):
    return scale * (output - label).abs().mean()


def unregistered_loss(output, label):
    return (output - label).abs().mean()


def through_json(value, **options):
    return from_json(json.loads(json.dumps(to_json(value, "param"))), "param", **options)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        0.1,
        "label",
        [1, "a", None],
        (1, 2),
        {"a": ["x", "y"], "b": "z"},
        {"tuple": [1]},
        {"map": {"name": "os:system"}},
        EarlyStopping(patience=2, monitor="f", mode="max", min_delta=0.5),
        torch.optim.AdamW,
        torch.optim.lr_scheduler.OneCycleLR,
        nn.functional.mse_loss,
        registered_loss,
        Linear3,
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_can_be_stored_comes_back_equal(value):
    again = through_json(value)
    assert again == value
    assert type(again) is type(value)


def test_numbers_of_numpy_and_paths_become_plain_ones():
    assert through_json(np.float32(0.5)) == 0.5
    assert through_json([np.int64(3)]) == [3]
    assert type(through_json([np.int64(3)])[0]) is int
    assert through_json(pathlib.PurePosixPath("/a/b")) == "/a/b"


def test_a_partial_comes_back_with_its_arguments():
    again = through_json(functools.partial(torch.optim.Adam, lr=0.1, betas=(0.8, 0.9)))
    assert (again.func, again.args, again.keywords) == (torch.optim.Adam, (), {"lr": 0.1, "betas": (0.8, 0.9)})
    nested = through_json(functools.partial(registered_loss, scale=functools.partial(registered_loss, 1)))
    assert nested.keywords["scale"].args == (1,)


@pytest.mark.parametrize(
    ("loss", "attributes"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1), {"label_smoothing": 0.1, "reduction": "mean"}),
        (nn.SmoothL1Loss(beta=0.3), {"beta": 0.3}),
        (nn.BCEWithLogitsLoss(), {"reduction": "mean"}),
    ],
    ids=["cross-entropy", "smooth", "logits"],
)
def test_a_loss_without_tensors_comes_back_with_its_settings(loss, attributes):
    again = through_json(loss)
    assert type(again) is type(loss)
    assert again is not loss
    assert {name: getattr(again, name) for name in attributes} == attributes


class Odd(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.doubled = 2 * scale

    def forward(self, output, label):
        return (output - label).sum() * self.doubled


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (lambda output, label: 0, ["loss", "<lambda>", "no name", "@sparkdeep.register", "take loss out"]),
        (unregistered_loss, ["loss", "unregistered_loss", "loading would refuse", "@sparkdeep.register"]),
        (functools.partial(unregistered_loss, label=1), ["loss.func", "unregistered_loss", "take loss out"]),
        (functools.partial(registered_loss, scale=object()), ["loss['scale']", "class object"]),
        (os.system, ["loss", "system", "no name"]),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), ["loss (CrossEntropyLoss) has tensors"]),
        (Odd(1.0), ["loss (Odd)", "constructor's arguments"]),
        ({"a": {"b": object()}}, ["loss['a']['b']", "class object"]),
        ({1: 2}, ["loss is of class dict"]),
    ],
    ids=["lambda", "function", "partial", "argument", "builtin", "tensors", "arguments", "nested", "keys"],
)
def test_what_cannot_be_stored_is_refused_by_name_with_a_remedy(value, parts):
    with pytest.raises(ConfigError) as caught:
        to_json(value, "loss")
    for part in parts:
        assert part in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Own(LocalWork):
    def steps(self, clock):
        return 3


def test_values_of_our_kinds_come_back_equal_and_a_users_own_are_refused_by_name():
    for value in (TrimmedMean(0.1), WarmStart(3, QSR(0.2)), Asynchronous(2, 3), Scaffold(), diloco(lr=0.5)):
        assert through_json(value) == value
    with pytest.raises(ConfigError, match=r"schedule is of class Own.*Take schedule out before saving, or use one of"):
        to_json(Own(), "schedule")
    assert {name for made in NAMED_SETTINGS.values() for name in made} > {"Median", "QSR", "FedProx", "diloco"}
    with pytest.raises(ConfigError, match=r"unknown schedule 'Median'. Known: AdaComm,"):
        named_value("schedule", "Median")


def test_a_function_in_a_class_of_the_same_name_is_not_mistaken_for_it():
    class Linear3(nn.Linear):
        pass

    with pytest.raises(ConfigError, match="no name"):
        to_json(Linear3, "model")
    shadow = type("Linear3", (nn.Linear,), {"__module__": __name__})
    with pytest.raises(ConfigError, match="cannot be stored as"):
        to_json(shadow, "model")


@pytest.mark.parametrize(
    "stored",
    [
        {"name": "os:system"},
        {"partial": "os:system", "args": ["touch /nowhere"], "kwargs": {}},
        {"partial": "subprocess:run", "args": [["id"]], "kwargs": {}},
        {"name": "builtins:exec"},
        {"partial": "torch.nn.attention._fa3:_fa3_import_module", "args": ["antigravity"], "kwargs": {}},
        {"name": "torch.nn.utils._deprecation_utils:_deprecation_warning"},
        {"module": "torch.optim:SGD", "kwargs": {}},
        {"name": "test_stored_values:unregistered_loss"},
        {"name": "never_imported:Net"},
        {"module": "torch.nn:Linear", "kwargs": {"nonsense": 1}},
        {"early_stopping": {"nonsense": 1}},
        {"name": "torch.optim:SGD", "more": 1},
        {"unknown": 1},
        {},
    ],
    ids=str,
)
def test_a_stored_name_outside_the_rules_is_refused_and_nothing_runs(stored):
    with pytest.raises(ModelLoadError, match="loss"):
        from_json(stored, "loss")


def test_a_listed_module_may_be_named():
    stored = {"name": f"{__name__}:unregistered_loss"}
    assert from_json(stored, "loss", allow_modules=[__name__]) is unregistered_loss
