"""Where parameters lie in the flat vector: read and write are exact, and what cannot be averaged is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparkdeep.errors import ConfigError
from sparkdeep.tensors.parameters import Layout, named_tensors


def mixed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    model.scale = nn.Parameter(torch.tensor(2.5))
    return model


def test_entries_follow_named_parameters_and_leave_frozen_ones_out():
    layout = Layout.of(mixed())
    assert [(e.name, e.shape, e.offset) for e in layout.entries] == [
        ("scale", (), 0),
        ("0.weight", (4, 3), 1),
        ("1.weight", (4,), 13),
        ("1.bias", (4,), 17),
        ("2.weight", (2, 4), 21),
        ("2.bias", (2,), 29),
    ]
    assert layout.numel == 31
    assert layout.num_bytes == 124
    assert layout.buffers == ("1.running_mean", "1.running_var", "1.num_batches_tracked")


@pytest.mark.parametrize(
    ("dtype", "vector"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_what_is_read_is_written_back_to_the_last_bit(dtype, vector):
    model = mixed().to(dtype)
    layout = Layout.of(model)
    flat = layout.read(model, layout.empty())
    assert flat.dtype == layout.dtype == vector
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    layout.write(other, flat)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) or not a.requires_grad, name
        assert b.dtype == dtype


def test_one_wide_parameter_widens_the_vector_so_that_none_is_rounded():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).double()])
    layout = Layout.of(model)
    flat = layout.read(model, layout.empty())
    assert flat.dtype == torch.float64
    layout.write(model, flat / 3)
    assert torch.equal(model[1].bias, flat[10:12] / 3)
    assert not torch.equal(model[1].bias, (flat[10:12].float() / 3).double())


def test_views_share_the_vectors_memory_in_the_parameters_shapes():
    layout = Layout.of(mixed())
    vector = torch.zeros(layout.numel)
    views = layout.views(vector)
    views[1][3, 2] = 7.0
    assert vector[12] == 7.0
    assert [tuple(v.shape) for v in views] == [e.shape for e in layout.entries]


def test_a_parameter_of_another_memory_layout_is_read_in_row_order():
    model = nn.Linear(3, 2, bias=False)
    model.weight = nn.Parameter(torch.arange(6.0).view(3, 2).t())
    layout = Layout.of(model)
    assert layout.read(model, layout.empty()).tolist() == [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]


def test_a_tied_parameter_has_one_entry():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    assert [e.name for e in Layout.of(model).entries] == ["0.weight", "0.bias", "1.bias"]
    assert [name for name, _ in named_tensors(model)] == ["0.weight", "0.bias", "1.bias"]


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (nn.LazyLinear(3), r"'weight' is not initialized yet: run one batch"),
        (nn.ReLU(), r"ReLU has no trainable parameter; set requires_grad=True"),
        (nn.Linear(2, 2).requires_grad_(False), r"Linear has no trainable parameter"),
        (nn.Linear(2, 2, dtype=torch.complex64), r"'weight' has dtype torch.complex64; only real floating-point"),
    ],
    ids=["lazy", "none", "frozen", "complex"],
)
def test_what_cannot_be_averaged_is_refused_with_a_remedy(model, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Layout.of(model)


def test_the_fingerprint_changes_with_name_shape_dtype_and_order():
    def print_of(*layers):
        return Layout.of(nn.Sequential(*layers)).fingerprint()

    same = [print_of(nn.Linear(2, 3), nn.Linear(3, 2)) for _ in range(2)]
    others = [
        print_of(nn.Linear(3, 2), nn.Linear(2, 3)),
        print_of(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)),
        print_of(nn.Linear(2, 3).double(), nn.Linear(3, 2)),
        print_of(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)),
    ]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 5
    assert len(same[0]) == 16
