"""State dicts survive the way through bytes, and nothing but data does."""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from sparkdeep.errors import CheckpointError
from sparkdeep.tensors.state_dicts import pack, pack_tensors, unpack, unpack_tensors

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def kinds(value):
    """The types all the way down, which `==` does not compare (True == 1, [] != () is all it knows)."""
    if isinstance(value, dict):
        return {repr(k): kinds(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(kinds, value)]
    return type(value).__name__


@settings(max_examples=200, deadline=None)
@given(TREES)
def test_trees_come_back_equal_in_value_and_type(tree):
    back = unpack(pack(tree))
    assert back == tree
    assert kinds(back) == kinds(tree)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "int64", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3)], ids=str)
def test_tensors_of_every_dtype_and_shape_come_back(dtype, shape):
    tensor = (torch.randn(shape) * 4).to(getattr(torch, dtype))
    back = unpack(pack({"x": [tensor]}))["x"][0]
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


def test_views_transposes_and_shared_memory_come_back_as_values():
    base = torch.arange(12.0).view(3, 4)
    back = unpack(pack({"t": base.t(), "row": base[1], "same": base, "again": base}))
    assert torch.equal(back["t"], base.t())
    assert torch.equal(back["row"], base[1])
    assert torch.equal(back["again"], base)


def test_numbers_that_are_not_finite_and_numpy_scalars_come_back():
    back = unpack(pack([math.nan, math.inf, -math.inf, np.float64(0.1), np.int64(3), np.bool_(True), {1, 2}]))
    assert math.isnan(back[0])
    assert back[1:] == [math.inf, -math.inf, 0.1, 3, True, {1, 2}]


def test_an_ordered_dict_keeps_its_order():
    assert list(unpack(pack(OrderedDict([("b", 1), ("a", 2), (0, 3)])))) == ["b", "a", 0]


class Thing:
    pass


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        ({"a": [1, Thing()]}, r"state\['a'\]\[1\] is a Thing; only tensors, numbers"),
        ({"a": {(1, 2): 3}}, r"state\['a'\] has a key of type tuple"),
        ((lambda: 0,), r"state\[0\] is a function"),
        ({"b": b"x"}, r"state\['b'\] is a bytes"),
        ({"a": np.zeros(3)}, r"state\['a'\] is a ndarray"),
    ],
)
def test_what_needs_pickle_is_refused_by_its_path(tree, complaint):
    with pytest.raises(TypeError, match=complaint):
        pack(tree)


def optimizers():
    yield partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
    yield partial(torch.optim.AdamW, lr=0.1, amsgrad=True)
    yield partial(torch.optim.Adagrad, lr=0.1)
    yield partial(torch.optim.RMSprop, lr=0.1, centered=True)
    yield partial(torch.optim.NAdam, lr=0.1)
    yield partial(torch.optim.LBFGS, lr=0.1, max_iter=3)


def warm_up(optimizer, start, steps):
    """A linear rise, then cosine: schedulers inside a scheduler."""
    return lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=start), lr_scheduler.CosineAnnealingLR(optimizer, steps)],
        milestones=[start],
    )


def clocks():
    yield partial(lr_scheduler.StepLR, step_size=2)
    yield partial(lr_scheduler.MultiStepLR, milestones=[3, 5])
    yield partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step)
    yield partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, cycle_momentum=False)
    yield partial(warm_up, start=3, steps=5)


def steps(model, optimizer, clock, count):
    for i in range(count):
        inputs = torch.full((2, 3), float(i + 1))

        def closure(inputs=inputs):
            optimizer.zero_grad()
            loss = model(inputs).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        if clock is not None:
            clock.step()


def pair(factory, clock_factory=None):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = factory(model.parameters())
    return model, optimizer, clock_factory(optimizer) if clock_factory else None


@pytest.mark.parametrize("factory", list(optimizers()), ids=lambda f: f.func.__name__)
def test_an_optimizer_goes_on_from_its_bytes_to_the_same_bits(factory):
    whole = pair(factory)
    steps(*whole, 3)
    model, optimizer, _ = pair(factory)
    model.load_state_dict(whole[0].state_dict())
    optimizer.load_state_dict(unpack(pack(whole[1].state_dict())))
    for each in (whole, (model, optimizer, None)):
        steps(*each, 4)
    assert torch.equal(model.weight, whole[0].weight)


@pytest.mark.parametrize("clock", list(clocks()), ids=lambda c: c.func.__name__)
def test_a_learning_rate_clock_goes_on_from_its_bytes(clock):
    sgd = partial(torch.optim.SGD, lr=0.1)
    whole = pair(sgd, clock)
    steps(*whole, 4)
    resumed = pair(sgd, clock)
    resumed[1].load_state_dict(unpack(pack(whole[1].state_dict())))
    resumed[2].load_state_dict(unpack(pack(whole[2].state_dict())))
    for _ in range(6):
        for each in (whole, resumed):
            steps(*each, 1)
        assert resumed[2].get_last_lr() == whole[2].get_last_lr()


def test_bytes_that_were_not_packed_or_are_damaged_are_refused_as_such():
    good = pack({"a": torch.ones(3), "b": [1, (2,)]})
    damaged = [b"", b"x" * 100, good[:-5], pickle.dumps({"a": 1}), pack_tensors({"a": torch.ones(2)})]
    for flip in range(0, 60, 7):
        data = bytearray(good)
        data[flip] ^= 0xFF
        damaged.append(bytes(data))
    for data in damaged:
        with pytest.raises(CheckpointError, match="damaged state of"):
            unpack(data)
    with pytest.raises(CheckpointError, match="damaged tensors of"):
        unpack_tensors(b"nonsense")


@pytest.mark.parametrize(
    "outline", ["[1", '{"t": "t9"}', '{"z": 1}', '{"t": [1]}', '{"d": [[[1], 2]]}', '{"a": 1, "b": 2}']
)
def test_an_outline_that_makes_no_sense_is_refused(outline):
    data = pack_tensors({"__tree__": torch.frombuffer(bytearray(outline.encode()), dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match="damaged"):
        unpack(data)


def test_tensors_that_share_memory_are_written_under_each_name():
    base = torch.arange(6.0)
    back = unpack_tensors(pack_tensors({"all": base, "part": base[2:4], "bf": base.bfloat16()}))
    assert back["part"].tolist() == [2.0, 3.0]
    assert back["bf"].dtype == torch.bfloat16
