from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from sparkdeep.data.arrow import Ragged
from sparkdeep.data.columns import read_fields
from sparkdeep.data.faults import Faults
from sparkdeep.data.schema import ColumnType, build_schema
from sparkdeep.errors import DataError, UserCodeError

VECTOR = pa.struct(
    [("type", pa.int8()), ("size", pa.int32()), ("indices", pa.list_(pa.int32())), ("values", pa.list_(pa.float64()))]
)


def sparse(size, indices, values):
    return {"type": 0, "size": size, "indices": indices, "values": values}


def dense(*values):
    return {"type": 1, "size": None, "indices": None, "values": list(values)}


def kind_of(array: pa.Array) -> ColumnType:
    kind = array.type
    if pa.types.is_struct(kind):
        return ColumnType(kind="vector", dtype="float64")
    if pa.types.is_binary(kind):
        return ColumnType(kind="binary", dtype="bytes")
    element = kind
    while hasattr(element, "value_type"):
        element = element.value_type
    return ColumnType(kind="scalar" if element is kind else "array", dtype=np.dtype(element.to_pandas_dtype()).name)


def read(columns, *, faults=None, allow_faults=False, **settings):
    arrays = {name: value if isinstance(value, pa.Array) else pa.array(value) for name, value in columns.items()}
    batch = pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))
    schema = build_schema(
        **{
            "types": {name: kind_of(array) for name, array in arrays.items()},
            "feature_cols": "x",
            "label_cols": None,
            "weight_col": None,
            **settings,
        }
    )
    faults = Faults() if faults is None else faults
    fields = read_fields(batch, schema, faults, settings.get("decode"))
    if not allow_faults:
        faults.raise_if_any()
    return fields


def exactly(array, expected, dtype):
    assert array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(array, np.array(expected, dtype), strict=True)


@pytest.mark.parametrize(
    ("arrow", "dtype"),
    [
        (pa.int8(), "int64"),
        (pa.int64(), "int64"),
        (pa.float32(), "float32"),
        (pa.float64(), "float32"),
        (pa.bool_(), "bool"),
    ],
)
def test_scalars_keep_their_kind(arrow, dtype):
    exactly(read({"x": pa.array([0, 1, 1], pa.int8()).cast(arrow)})["features"], [0, 1, 1], dtype)


def test_sliced_scalars_and_booleans_read_only_their_rows():
    for values in ([1.5, 2.5, 3.5, 4.5], [True, False, True, True]):
        got = read({"x": pa.array(values).slice(1, 2)})["features"]
        np.testing.assert_array_equal(got, values[1:3])


def test_float32_is_a_view_of_arrow_memory_not_a_copy():
    array = pa.array([1, 2, 3], pa.float32())
    got = read({"x": array})["features"]
    assert got.ctypes.data == array.buffers()[1].address
    assert not got.flags.writeable


def test_forty_scalars_fill_one_matrix_in_column_order():
    want = np.arange(200, dtype=np.float64).reshape(5, 40)
    columns = {f"c{j}": pa.array(want[:, j]) for j in range(40)}
    exactly(read(columns, feature_cols=list(columns))["features"], want, "float32")


def test_scalars_arrays_and_vectors_lie_side_by_side():
    columns = {
        "a": [1, 2],
        "b": pa.array([[10.0, 11.0], [20.0, 21.0]]),
        "v": pa.array([dense(5.0, 6.0), sparse(2, [1], [7.0])], VECTOR),
        "m": [True, False],
    }
    got = read(columns, feature_cols=["a", "b", "v", "m"])["features"]
    exactly(got, [[1, 10, 11, 5, 6, 1], [2, 20, 21, 0, 7, 0]], "float32")


def test_one_scalar_in_a_list_is_a_column_and_alone_is_flat():
    assert read({"x": [1, 2, 3]}, feature_cols=["x"])["features"].shape == (3, 1)
    assert read({"x": [1, 2, 3]}, feature_cols="x")["features"].shape == (3,)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "arrow",
    [
        pa.list_(pa.list_(pa.int32())),
        pa.large_list(pa.large_list(pa.int32())),
        pa.list_(pa.list_(pa.int32(), 3)),
        pa.list_(pa.list_(pa.int32(), 3), 2),
        pa.list_(pa.list_(pa.int32()), 2),
    ],
    ids=str,
)
def test_arrays_of_arrays_of_every_layout_and_slice_keep_their_shape(arrow, stacked):
    want = np.arange(42).reshape(7, 2, 3)
    array = pa.array(want.tolist(), arrow)
    for start, count in [(0, 7), (2, 3), (6, 1)]:
        got = read({"x": array.slice(start, count)}, feature_cols=["x"] if stacked else "x")["features"]
        exactly(got, want[start : start + count], "int64")


def test_vectors_dense_sparse_mixed_and_sliced_match_row_by_row_filling():
    rng = np.random.default_rng(0)
    for mode in ("dense", "sparse", "mixed"):
        want, rows = np.zeros((30, 6)), []
        for i in range(30):
            if mode == "dense" or (mode == "mixed" and i % 3):
                want[i] = rng.normal(size=6)
                rows.append(dense(*want[i]))
            else:
                chosen = np.sort(rng.choice(6, rng.integers(0, 7), replace=False))
                want[i, chosen] = rng.normal(size=len(chosen))
                rows.append(sparse(6, chosen.tolist(), want[i, chosen].tolist()))
        array = pa.array(rows, VECTOR)
        for start, count in [(0, 30), (7, 11), (29, 1)]:
            got = read({"x": array.slice(start, count)}, float_dtype="float64")["features"]
            exactly(got, want[start : start + count], "float64")


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (sparse(3, [0, 3], [1.0, 1.0]), "indices outside 0 to 2"),
        (sparse(3, [-1], [1.0]), "indices outside 0 to 2"),
        (sparse(3, [0, 1], [1.0]), "indices and values differ in number"),
    ],
)
def test_malformed_sparse_vectors_are_refused(vector, message):
    with pytest.raises(DataError, match=message):
        read({"x": pa.array([dense(1.0, 2.0, 3.0), vector], VECTOR)})


def test_other_structs_are_refused():
    with pytest.raises(DataError, match="of structs only Spark ML vectors"):
        read({"x": pa.array([{"a": 1}])})


def test_ragged_rows_are_values_and_lengths():
    array = pa.array([[9], [1, 2], [], [3, 4, 5], [8]], pa.list_(pa.int32())).slice(1, 3)
    got = read({"x": array}, collate=list)["features"]
    assert isinstance(got, Ragged)
    exactly(got.values, [1, 2, 3, 4, 5], "int64")
    exactly(got.lengths, [2, 0, 3], "int64")


def test_ragged_null_rows_and_elements_are_counted():
    faults = Faults()
    array = pa.array([[1.0, None], None, [float("nan")]])
    got = read({"x": array}, collate=list, faults=faults, allow_faults=True)["features"]
    exactly(got.values, [1, 0, 0], "float32")
    exactly(got.lengths, [2, 0, 1], "int64")
    assert (faults.nulls, faults.nans, faults.lengths) == ({"x": 2}, {"x": 1}, {})


def test_collate_is_for_flat_arrays():
    with pytest.raises(DataError, match="collate= is for arrays of numbers"):
        read({"x": pa.array([[[1]]])}, collate=list)


@pytest.mark.fault(rows=[28], phases="LD")
def test_nulls_and_nans_are_totaled_over_batches_and_named():
    faults = Faults()
    columns = {"x": [1.0, None, float("nan")], "y": pa.array([None, 1, 2], pa.int32()), "w": [1.0, 1.0, float("nan")]}
    for _ in range(2):
        got = read(columns, label_cols="y", weight_col="w", faults=faults, allow_faults=True)
        exactly(got["features"], [1, 0, 0], "float32")
        exactly(got["label"], [0, 1, 2], "int64")
    assert faults.nulls == {"x": 2, "y": 2}
    assert faults.nans == {"x": 2, "w": 2}
    with pytest.raises(DataError) as caught:
        faults.raise_if_any()
    message = str(caught.value)
    for part in ("'x' has 2 null", "'y' has 2 null", "'w' has 2 NaN", "dropna(subset=['x', 'y', 'w'])", "impute"):
        assert part in message
    assert "collate" not in message


def test_nulls_inside_arrays_and_vectors_are_counted():
    faults = Faults()
    columns = {
        "x": pa.array([[1, None], None, [None, None]]),
        "v": pa.array([dense(float("nan")), None, dense(1.0)], VECTOR),
    }
    got = read(columns, feature_cols={"x": "x", "v": "v"}, faults=faults, allow_faults=True)
    assert got["features.x"].shape == (3, 2)
    assert got["features.v"].shape == (3, 1)
    assert (faults.nulls, faults.nans) == ({"x": 4, "v": 1}, {"v": 1})


def test_infinities_are_not_nans():
    faults = Faults()
    got = read({"x": [float("inf"), float("-inf"), 1.0]}, faults=faults)["features"]
    assert np.isinf(got[:2]).all()
    assert not faults.found


def test_arrays_of_uneven_length_are_noted_and_become_zeros_of_the_first_shape():
    faults = Faults()
    got = read({"x": pa.array([[1, 2, 3], [4], [5, 6, 7, 8]])}, faults=faults, allow_faults=True)["features"]
    exactly(got, np.zeros((3, 3)), "int64")
    assert faults.lengths == {"x": (1, 4)}
    with pytest.raises(DataError, match=r"'x' has arrays of 1 to 4 elements.*pad or cut.*collate="):
        faults.raise_if_any()


def test_batches_even_in_themselves_but_not_with_each_other_are_found():
    faults = Faults()
    read({"x": pa.array([[1, 2]])}, faults=faults)
    assert not faults.found
    got = read({"x": pa.array([[1, 2, 3]])}, faults=faults, allow_faults=True)["features"]
    exactly(got, np.zeros((1, 2)), "int64")
    assert faults.lengths == {"x": (2, 3)}


@pytest.mark.fault(rows=[28], phases="LD")
def test_partitions_even_in_themselves_but_not_with_each_other_are_found_by_merging():
    one, two = Faults(), Faults()
    read({"x": pa.array([[1, 2]])}, faults=one)
    read({"x": pa.array([[1, 2, 3]])}, faults=two)
    assert not one.found
    assert not two.found
    one.merge(Faults.from_json(json.loads(json.dumps(two.to_json()))))
    assert one.lengths == {"x": (2, 3)}
    with pytest.raises(DataError, match="arrays of 2 to 3"):
        one.raise_if_any()


def test_uneven_inner_arrays_and_vectors_are_noted():
    faults = Faults()
    columns = {"x": pa.array([[[1], [2]], [[3, 4], [5]]]), "v": pa.array([dense(1.0), sparse(4, [], [])], VECTOR)}
    read(columns, feature_cols={"x": "x", "v": "v"}, faults=faults, allow_faults=True)
    assert faults.lengths == {"x": (2, 2), "x[*]": (1, 2), "v": (1, 4)}


def test_uneven_arrays_in_a_list_keep_the_first_width():
    faults = Faults()
    for rows in ([[1, 2]], [[1, 2, 3]], [[1]], [[1], [2, 3]]):
        columns = {"x": pa.array(rows), "a": [0] * len(rows)}
        got = read(columns, feature_cols=["x", "a"], faults=faults, allow_faults=True)["features"]
        assert got.shape == (len(rows), 3)
    assert faults.lengths["x"] == (1, 3)


def test_merge_adds_counts():
    faults = Faults(nulls={"a": 1}, nans={"b": 2}, lengths={"c": (2, 3)})
    faults.merge(Faults(nulls={"a": 4, "d": 1}, nans={}, lengths={"c": (1, 2)}))
    assert faults == Faults(nulls={"a": 5, "d": 1}, nans={"b": 2}, lengths={"c": (1, 3)})


def test_no_faults_raise_nothing():
    faults = Faults(lengths={"x": (3, 3)})
    faults.raise_if_any()
    assert not faults.found


@pytest.mark.parametrize("weight", [-0.5, float("inf")])
def test_bad_weights_are_refused_at_once(weight):
    with pytest.raises(DataError, match=rf"'w' holds {weight}: weights must be finite and zero or more"):
        read({"x": [1, 2], "w": [1.0, weight]}, weight_col="w")


def test_zero_weights_and_integer_weights_are_fine():
    exactly(read({"x": [1, 2], "w": [0, 3]}, weight_col="w")["weight"], [0, 3], "float32")


def test_columns_that_cannot_be_trained_on_are_refused():
    columns = {"x": pa.array(["a"])}
    schema = build_schema(
        types={"x": ColumnType(kind="scalar", dtype="int64")}, feature_cols="x", label_cols=None, weight_col=None
    )
    with pytest.raises(DataError, match="'x' holds string"):
        read_fields(pa.RecordBatch.from_pydict(columns), schema, Faults())
    with pytest.raises(DataError, match="no single column 'x' among"):
        read_fields(pa.RecordBatch.from_pydict({"z": pa.array([1])}), schema, Faults())
    with pytest.raises(DataError, match="holds float64, but field 'features' stores int64"):
        read_fields(pa.RecordBatch.from_pydict({"x": pa.array([1.5])}), schema, Faults())


def test_arrays_of_arrays_cannot_lie_beside_others():
    with pytest.raises(DataError, match="give it its own key in a dict"):
        read({"x": pa.array([[[1]]]), "a": [1]}, feature_cols=["x", "a"])


@pytest.mark.parametrize(
    ("array", "settings", "shape"),
    [
        (pa.array([], pa.float64()), {}, (0,)),
        (pa.array([], pa.float64()), {"feature_cols": ["x"]}, (0, 1)),
        (pa.array([], pa.list_(pa.int32())), {}, (0, 0)),
        (pa.array([], pa.list_(pa.int32(), 4)), {}, (0, 0)),
        (pa.array([], VECTOR), {}, (0, 0)),
        (pa.array([], pa.binary()), {"decode": bytes}, (0,)),
    ],
)
def test_a_batch_without_rows_gives_fields_without_rows(array, settings, shape):
    assert read({"x": array}, **settings)["features"].shape == shape


def test_a_batch_without_rows_takes_the_shape_that_is_known():
    types = {"x": ColumnType(kind="array", dtype="int32"), "a": ColumnType(kind="scalar", dtype="int32")}
    for columns in ("x", ["x", "a"]):
        schema = build_schema(types=types, feature_cols=columns, label_cols=None, weight_col=None)
        schema = schema.with_seen({"features": ("int64", (5,))})
        batch = pa.RecordBatch.from_pydict({"x": pa.array([], pa.list_(pa.int32())), "a": pa.array([], pa.int32())})
        assert read_fields(batch, schema, Faults())["features"].shape == (0, 5)


def test_rows_that_contradict_a_fixed_shape_are_found():
    types = {"x": ColumnType(kind="array", dtype="int32"), "a": ColumnType(kind="scalar", dtype="int32")}
    batch = pa.RecordBatch.from_pydict({"x": pa.array([[1, 2]], pa.list_(pa.int32())), "a": pa.array([0], pa.int32())})
    alone = build_schema(types=types, feature_cols="x", label_cols=None, weight_col=None)
    faults = Faults()
    got = read_fields(batch, alone.with_seen({"features": ("int64", (5,))}), faults)
    assert got["features"].shape == (1, 5)
    assert faults.lengths == {"x": (2, 5)}
    listed = build_schema(types=types, feature_cols=["x", "a"], label_cols=None, weight_col=None)
    with pytest.raises(DataError, match=r"3 values wide here, and its rows had shape \(5,\) before"):
        read_fields(batch, listed.with_seen({"features": ("int64", (5,))}), Faults())


def uint8s(data):
    return np.frombuffer(data, np.uint8).reshape(2, -1)


def test_decoded_rows_keep_shape_and_dtype():
    for columns in ("x", ["x"]):
        got = read({"x": pa.array([b"abcd", b"efgh"])}, feature_cols=columns, decode=uint8s)["features"]
        exactly(got, [[[97, 98], [99, 100]], [[101, 102], [103, 104]]], "uint8")


def test_decoded_float64_is_stored_as_float_dtype():
    for float_dtype in ("float32", "float64"):
        got = read({"x": [b"ab"]}, decode={"x": lambda b: np.ones(len(b))}, float_dtype=float_dtype)["features"]
        exactly(got, [[1, 1]], float_dtype)


def test_decoded_numbers_listed_alone_are_a_column():
    got = read({"x": [b"ab", b"c"]}, feature_cols=["x"], decode=lambda b: np.int64(len(b)))["features"]
    exactly(got, [[2], [1]], "int64")


def test_decoded_numbers_listed_alone_are_a_column_also_once_their_shape_is_fixed():
    types = {"x": ColumnType(kind="binary", dtype="bytes")}
    schema = build_schema(types=types, feature_cols=["x"], label_cols=None, weight_col=None, decode=len)
    schema = schema.with_seen({"features": ("int64", (1,))})
    batch = pa.RecordBatch.from_pydict({"x": pa.array([b"ab", b"c"])})
    exactly(read_fields(batch, schema, Faults(), len)["features"], [[2], [1]], "int64")


def test_decoded_faults_are_counted():
    faults = Faults()
    decode = {"x": lambda b: np.full(len(b), np.nan if b == b"zz" else 1.0, np.float32)}
    got = read({"x": pa.array([None, b"ab", b"zz"])}, decode=decode, faults=faults, allow_faults=True)["features"]
    exactly(got, [[0, 0], [1, 1], [0, 0]], "float32")
    assert (faults.nulls, faults.nans) == ({"x": 1}, {"x": 2})
    read({"x": pa.array([b"abc"])}, decode=decode, faults=faults, allow_faults=True)
    assert faults.lengths == {"x": (2, 3)}


def test_decode_that_raises_is_the_users_error_with_its_cause():
    def decode(data):
        raise OSError("not a JPEG")

    with pytest.raises(
        UserCodeError, match=r"decode= raised OSError on column 'x', row 0.*\(2 bytes\): not a JPEG"
    ) as got:
        read({"x": [b"ab"]}, decode=decode)
    assert "in decode" in got.value.traceback_text


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (["text"], "decode= gave <U4"),
        ([np.int8(1), np.int16(1)], "gave int16 .* and int8 before: return one dtype"),
        ([np.zeros(2), np.zeros((2, 1))], r"gave shape \(2, 1\).* and \(2,\) before: return one shape"),
    ],
)
def test_decode_must_return_one_kind_of_numbers(results, message):
    remaining = iter(results)
    with pytest.raises(DataError, match=message):
        read({"x": [b"a"] * len(results)}, decode=lambda data: next(remaining))
