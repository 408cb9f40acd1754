"""A scorer in a Python worker, without Spark around it."""

from __future__ import annotations

import dataclasses

import cloudpickle
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from twin import schema_of

from sparkdeep.errors import ConfigError, DataError
from sparkdeep.models.packing import pack_program
from sparkdeep.models.prediction import Prediction
from sparkdeep.models.program import Program
from sparkdeep.spark.model import scoring
from sparkdeep.spark.model.scoring import ZERO_ROWS, Scorer, zero_output
from sparkdeep.tensors.parameters import named_tensors
from sparkdeep.tensors.state_dicts import pack_tensors


def schema():
    whole = schema_of(np.zeros(1, np.float32))
    return dataclasses.replace(whole, fields=tuple(dataclasses.replace(f, columns=("x",)) for f in whole.fields))


def scorer(model, choice=None, batch_size=4, preprocess=None):
    return Scorer(
        uid="u",
        program=pack_program(Program(model=model, loss=None, optimizer=torch.optim.SGD, preprocess=preprocess)),
        tensors=pack_tensors({name: t.detach() for name, t in named_tensors(model)}),
        schema=schema(),
        prediction=cloudpickle.dumps(Prediction(choice=choice, sql_type="float")),
        decode=cloudpickle.dumps(None),
        columns=("x",),
        batch_size=batch_size,
    )


class Doubled(nn.Module):
    def forward(self, x):
        return x * 2


class Squeezed(nn.Module):
    def forward(self, x):
        return torch.stack([x, x], 1)[:, :1].mean(0) if len(x) < 4 else x


ROWS = pa.array(np.arange(9, dtype=np.float32))


def test_every_row_gets_its_value_over_batches():
    loaded = scoring._Loaded(scorer(Doubled()))
    assert loaded.predict([ROWS]).to_pylist() == [2.0 * i for i in range(9)]
    assert loaded.predict([ROWS[:0]]).to_pylist() == []


def test_values_that_are_not_one_a_row_are_refused_with_both_numbers():
    loaded = scoring._Loaded(scorer(Squeezed()))
    assert len(loaded.predict([ROWS[:8]])) == 8
    with pytest.raises(ConfigError, match=r"has 1 values for 3 input rows; transform needs one a row"):
        loaded.predict([ROWS[:3]])


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("by", torch.ones(1))

    def forward(self, x):
        return x + self.by


def test_modules_beside_the_model_go_to_its_device(monkeypatch):
    assert scoring._Loaded(scorer(Doubled(), preprocess=Shift())).predict([ROWS[:2]]).to_pylist() == [2.0, 4.0]
    monkeypatch.setattr(scoring, "resolve_device", lambda *_: "meta")
    assert scoring._Loaded(scorer(Doubled(), preprocess=Shift())).program.preprocess.by.device.type == "meta"


def test_rows_of_zeros_tell_the_shape_of_the_output():
    program = Program(model=Doubled(), loss=None, optimizer=torch.optim.SGD)
    assert zero_output(program, schema(), torch.float32).shape == (ZERO_ROWS,)


class RowsSeen(nn.Module):
    """Gives each row the number of rows in its batch."""

    def forward(self, x):
        return torch.full((len(x),), float(len(x)))


def test_the_model_sees_batches_of_its_size_however_many_rows_are_read_at_once(monkeypatch):
    for read_bytes, read_rows in ((1, 4), (4 * 4 * 2, 8), (1 << 20, (1 << 18) // 4 * 4)):
        monkeypatch.setattr(scoring, "_READ_BYTES", read_bytes)
        loaded = scoring._Loaded(scorer(RowsSeen()))
        assert loaded.read_rows == read_rows
        assert loaded.predict([ROWS]).to_pylist() == [4.0] * 8 + [1.0]
        assert scoring._Loaded(scorer(Doubled())).predict([ROWS]).to_pylist() == [2.0 * i for i in range(9)]


def test_a_fault_in_a_later_batch_of_those_read_together_is_found():
    loaded = scoring._Loaded(scorer(Doubled()))
    with pytest.raises(DataError, match=r"column 'x' has 1 null"):
        loaded.predict([pa.array([1.0] * 8 + [None], pa.float32())])
