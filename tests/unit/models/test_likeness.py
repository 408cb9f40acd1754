"""Programs that look alike by name are told apart by what they do; the same program is the same in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from sparkdeep.models.likeness import details_of
from sparkdeep.models.program import Program

SGD = partial(torch.optim.SGD, lr=0.1)


def details(model=None, **parts):
    model = model or nn.Linear(2, 1)
    return json.dumps(
        details_of(Program(model=model, **{"loss": nn.MSELoss(), "optimizer": SGD, **parts})), sort_keys=True
    )


def net(activation=nn.Tanh, dropout=0.0, seed=0, frozen=True):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 4), activation(), nn.Dropout(dropout), nn.Linear(4, 1))
    model[0].requires_grad_(not frozen)
    return model


def rate(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def loss_of(power):
    def loss(output, label):
        return (output - label).abs().pow(power).mean()

    return loss


class Twice(nn.Module):
    def __init__(self, factor=2.0, more=None):
        super().__init__()
        self.net, self.factor, self.more = nn.Linear(2, 1), factor, more

    def forward(self, x):
        return self.net(x) * self.factor


class Scale:
    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return x * self.by

    def half(self, x):
        return x / 2


OTHERS = {
    "activation": (lambda: details(net()), lambda: details(net(nn.ReLU))),
    "dropout": (lambda: details(net()), lambda: details(net(dropout=0.9))),
    "frozen layer drawn anew": (lambda: details(net()), lambda: details(net(seed=1))),
    "what is frozen": (lambda: details(net()), lambda: details(net(frozen=False))),
    "setting of a module of the user's": (lambda: details(Twice()), lambda: details(Twice(3.0))),
    "deep in an attribute": (lambda: details(Twice(more={"a": [1, 2]})), lambda: details(Twice(more={"a": [1, 3]}))),
    "hook": (lambda: details(net()), lambda: details(hooked(net()))),
    "rate in a closure": (lambda: details(optimizer=rate(0.1)), lambda: details(optimizer=rate(0.5))),
    "rate in a partial": (lambda: details(), lambda: details(optimizer=partial(torch.optim.SGD, lr=0.5))),
    "closure of a loss": (lambda: details(loss=loss_of(1)), lambda: details(loss=loss_of(2))),
    "code of a lambda": (
        lambda: details(loss=lambda o, y: (o - y).sum()),
        lambda: details(loss=lambda o, y: (o + y).sum()),
    ),
    "constant in it": (lambda: details(loss=lambda o, y: o.sum() * 2), lambda: details(loss=lambda o, y: o.sum() * 3)),
    "class weights": (
        lambda: details(loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))),
        lambda: details(loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))),
    ),
    "collate": (lambda: details(collate=max), lambda: details(collate=min)),
    "callable object": (lambda: details(preprocess=Scale(1.0)), lambda: details(preprocess=Scale(2.0))),
    "method": (lambda: details(preprocess=Scale(1.0)), lambda: details(preprocess=Scale(1.0).half)),
    "code of a class": (lambda: details(made_class("x * 2")()), lambda: details(made_class("x * 3")())),
}


def hooked(model):
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    return model


def made_class(expression):
    body = textwrap.dedent(f"""
        class Made(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Linear(2, 1)
            def forward(self, x):
                x = self.net(x)
                return {expression}
    """)
    space = {"nn": nn, "__name__": "made"}
    exec(body, space)
    return space["Made"]


@pytest.mark.parametrize("case", OTHERS)
def test_what_differs_is_told_apart(case):
    one, other = OTHERS[case]
    assert one() == one()
    assert one() != other()


def test_trained_parameters_drawn_anew_are_the_same_program():
    assert details(net(seed=1, frozen=False)) == details(net(seed=2, frozen=False))
    model, other = Twice(), Twice()
    assert not torch.equal(model.net.weight, other.net.weight)
    assert details(model, loss=penalized(model)) == details(other, loss=penalized(other))


def penalized(net):
    return lambda o, y: o.sum() + net.net.weight.sum()


PRINTED = """
import json, sys
sys.path[:0] = sys.argv[1:]
import test_likeness as t
from torch import nn
names = lambda x: [n for n in x if n in {"a", "b", "c", "d", "e"}]
print(t.details(t.net(), loss=t.loss_of(1), optimizer=t.rate(0.1), preprocess=t.Scale(1.0), collate=names))
"""


def test_another_process_says_the_same(tmp_path):
    (tmp_path / "printed.py").write_text(PRINTED)
    here = str(Path(__file__).parent)
    said = {
        subprocess.run(
            [sys.executable, str(tmp_path / "printed.py"), here],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(said) == 1


def test_objects_that_hold_each_other_are_described_in_a_moment():
    class Node:
        def __init__(self, width):
            self.others = [self] * width

        def __call__(self, x):
            return x

    assert details(preprocess=Node(40)) == details(preprocess=Node(40))
    assert details(preprocess=Node(40)) != details(preprocess=Node(39))
