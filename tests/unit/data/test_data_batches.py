from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from sparkdeep.data.arrow import Ragged
from sparkdeep.data.batches import Batch, make_batch
from sparkdeep.data.schema import ColumnType, build_schema
from sparkdeep.errors import UserCodeError

TYPES = {
    "x": ColumnType(kind="scalar", dtype="float64"),
    "n": ColumnType(kind="scalar", dtype="int32"),
    "b": ColumnType(kind="scalar", dtype="bool"),
    "t": ColumnType(kind="array", dtype="int64"),
    "s": ColumnType(kind="array", dtype="float32"),
}


def schema(feature_cols, label_cols=None, weight_col=None, collate=None, float_dtype="float32"):
    return build_schema(
        types=TYPES,
        feature_cols=feature_cols,
        label_cols=label_cols,
        weight_col=weight_col,
        collate=collate,
        float_dtype=float_dtype,
    )


def padded(rows):
    return pad_sequence(rows, batch_first=True)


def test_one_positional_field_is_a_tensor_and_absent_parts_are_none():
    batch = make_batch({"features": np.ones((3, 1), np.float32)}, schema(["x"]), float_dtype=torch.float32)
    torch.testing.assert_close(batch.features, torch.ones(3, 1))
    assert (batch.labels, batch.weights, batch.rows) == (None, None, 3)


def test_named_fields_are_dicts_by_argument():
    fields = {
        "features.a": np.ones(2, np.float32),
        "features.n": np.array([1, 2]),
        "label.u": np.array([True, False]),
        "label.v": np.array([0.5, 0.5], np.float32),
    }
    batch = make_batch(fields, schema({"a": "x", "n": "n"}, {"u": "b", "v": "x"}), float_dtype=torch.float32)
    assert list(batch.features) == ["a", "n"]
    assert list(batch.labels) == ["u", "v"]
    assert batch.features["n"].tolist() == [1, 2]


@pytest.mark.parametrize("float_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_only_floats_are_cast_and_weights_never_lose_bits(float_dtype):
    fields = {
        "features.x": np.array([1.0, 0.1], np.float32),
        "features.n": np.array([1, 2]),
        "features.b": np.array([True, False]),
        "label": np.array([0.5, 0.1], np.float32),
        "weight": np.array([1.0009765625, 3.0], np.float32),
    }
    used = schema({"x": "x", "n": "n", "b": "b"}, "x", "x")
    batch = make_batch(fields, used, float_dtype=float_dtype)
    assert [batch.features[key].dtype for key in "xnb"] == [float_dtype, torch.int64, torch.bool]
    assert batch.labels.dtype == float_dtype
    torch.testing.assert_close(batch.features["x"], torch.tensor([1.0, 0.1]).to(float_dtype), rtol=0, atol=0)
    assert batch.weights.tolist() == [1.0009765625, 3.0]


def test_images_of_bytes_stay_bytes():
    types = {"i": ColumnType(kind="binary", dtype="bytes")}
    used = build_schema(types=types, feature_cols="i", label_cols=None, weight_col=None, decode=bytes)
    batch = make_batch({"features": np.full((2, 3), 7, np.uint8)}, used, float_dtype=torch.float32)
    assert batch.features.dtype == torch.uint8


def test_writable_arrays_are_shared_and_read_only_ones_copied():
    shared = np.ones(3, np.float32)
    frozen = np.ones(3, np.float32)
    frozen.flags.writeable = False
    used = schema("x")
    make_batch({"features": shared}, used, float_dtype=torch.float32).features.zero_()
    make_batch({"features": frozen}, used, float_dtype=torch.float32).features.zero_()
    assert shared.sum() == 0
    assert frozen.sum() == 3


def test_ragged_rows_are_collated_in_order_in_the_right_dtype():
    used = schema({"t": "t", "s": "s"}, collate={"t": padded, "s": padded})
    fields = {
        "features.t": Ragged(np.array([1, 2, 3]), np.array([2, 0, 1])),
        "features.s": Ragged(np.array([0.5], np.float32), np.array([0, 1, 0])),
    }
    batch = make_batch(fields, used, float_dtype=torch.float64, collate={"t": padded, "s": padded})
    assert batch.features["t"].tolist() == [[1, 2], [0, 0], [3, 0]]
    assert batch.features["s"].tolist() == [[0.0], [0.5], [0.0]]
    assert (batch.features["t"].dtype, batch.features["s"].dtype) == (torch.int64, torch.float64)
    assert batch.rows == 3


def test_one_collate_serves_all_ragged_fields():
    fields = {"features": Ragged(np.array([1, 2, 3]), np.array([1, 2]))}
    batch = make_batch(fields, schema("t", collate=padded), float_dtype=torch.float32, collate=padded)
    assert batch.features.tolist() == [[1, 0], [2, 3]]


def test_collate_that_raises_is_the_users_error():
    def collate(rows):
        raise RuntimeError("no rows")

    fields = {"features": Ragged(np.array([1, 2, 3]), np.array([1, 2]))}
    with pytest.raises(
        UserCodeError, match=r"collate= raised RuntimeError on column 't', 2 rows of int64: no rows"
    ) as got:
        make_batch(fields, schema("t", collate=collate), float_dtype=torch.float32, collate=collate)
    assert "in collate" in got.value.traceback_text


def test_to_moves_every_tensor():
    batch = Batch(
        features={"a": torch.ones(2), "p": (torch.ones(2), [torch.ones(2)])},
        labels=torch.ones(2),
        weights=torch.ones(2),
        rows=2,
    )
    moved = batch.to("meta", non_blocking=True)
    tensors = [moved.features["a"], moved.features["p"][0], moved.features["p"][1][0], moved.labels, moved.weights]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.rows == 2
    assert batch.labels.device.type == "cpu"
    assert Batch(features=torch.ones(1), labels=None, weights=None, rows=1).to("meta").labels is None
