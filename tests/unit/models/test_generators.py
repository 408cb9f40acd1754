"""Fits in threads of one driver, as a search starts them, do not disturb each other's random numbers."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from torch import nn

from sparkdeep.models.building import build_model
from sparkdeep.models.generators import forked
from sparkdeep.replica.state import RandomState

TURN_S = 0.3  # for the other thread to come in between, where nothing keeps it out


class Two(nn.Module):
    """Two layers; between them something may happen."""

    def __init__(self, between=lambda: None):
        super().__init__()
        self.first = nn.Linear(3, 3)
        between()
        self.second = nn.Linear(3, 3)


def drawn_beside(other):
    """The second layer of a network that is built while another thread is in the middle of `other`, if it gets there."""
    inside, built = threading.Event(), threading.Event()

    def middle():
        inside.set()
        built.wait(30)

    thread = threading.Thread(target=other, args=(middle,))

    def between():
        thread.start()
        inside.wait(TURN_S)

    model = build_model(Two, {"between": between}, 0)
    built.set()
    thread.join(timeout=30)
    assert inside.is_set(), "the other thread had its turn in the end"
    return model.second.weight


def another_model(middle):
    build_model(Two, {"between": middle}, 7)


def a_replica(middle):
    with RandomState(5, torch.device("cpu")).installed():
        torch.randn(3)
        middle()


def without_turns(middle):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        middle()


@pytest.mark.parametrize("other", [another_model, a_replica])
def test_a_model_that_is_built_beside_others_has_the_weights_of_its_seed(other):
    assert torch.equal(drawn_beside(other), build_model(Two, {}, 0).second.weight)


def test_without_turns_it_would_have_others():
    before = torch.get_rng_state()
    try:
        assert not torch.equal(drawn_beside(without_turns), build_model(Two, {}, 0).second.weight)
    finally:
        torch.set_rng_state(before)


def test_a_block_within_a_block_and_one_that_raises_leave_the_stream_as_it_was():
    before = torch.get_rng_state()
    with forked(1):
        outer = torch.randn(2)
        with forked(2):
            inner = torch.randn(2)
        after = torch.randn(2)
    assert torch.equal(torch.get_rng_state(), before)
    with forked(1):
        assert torch.equal(torch.randn(4), torch.cat([outer, after]))
    with forked(2):
        assert torch.equal(torch.randn(2), inner)
    with contextlib.suppress(KeyError), forked(1):
        torch.randn(2)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
