"""Rows of numpy values as Arrow columns, against what pyarrow makes of plain Python lists."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from sparkdeep.data.petastorm.nested import column_of
from sparkdeep.errors import DataError


def nested(kind, depth):
    for _ in range(depth):
        kind = pa.list_(kind)
    return kind


@settings(deadline=None)  # the first call imports
@given(
    values=st.integers(1, 3).flatmap(
        lambda ndim: st.lists(
            st.one_of(
                st.none(),
                npst.arrays(np.int32, npst.array_shapes(min_dims=ndim, max_dims=ndim, min_side=0, max_side=3)),
            ),
            max_size=6,
        ).map(lambda rows: (ndim, rows))
    )
)
def test_rows_of_any_shape_and_nulls_are_what_pyarrow_makes_of_lists(values):
    ndim, rows = values
    column = column_of(rows, pa.int32(), ndim, "x")
    column.validate(full=True)
    assert column.equals(pa.array([None if row is None else row.tolist() for row in rows], nested(pa.int32(), ndim)))


@settings(deadline=None)
@given(npst.arrays(np.int16, npst.array_shapes(min_dims=2, max_dims=4, min_side=0, max_side=4)))
def test_rows_in_one_array_are_those_in_a_list(values):
    column = column_of(values, pa.int16(), values.ndim - 1, "x")
    column.validate(full=True)
    assert column.equals(column_of(list(values), pa.int16(), values.ndim - 1, "x"))


@pytest.mark.parametrize(
    ("given_", "kind"),
    [
        (np.arange(3, dtype=np.uint8), pa.int16()),
        (np.arange(3, dtype=np.uint32), pa.int64()),
        (np.arange(3, dtype=np.float16), pa.float32()),
        (np.array([True, False, True]), pa.bool_()),
    ],
)
def test_numbers_that_spark_lacks_become_wider(given_, kind):
    for values in (given_, list(given_)):
        column = column_of(values, kind, 0, "x")
        assert column.type == kind
        assert column.to_pylist() == given_.tolist()


def test_nulls_of_integers_that_pandas_made_nan_are_nulls_again():
    column = column_of(np.array([1.0, np.nan, 3.0]), pa.int32(), 0, "x")
    assert column.type == pa.int32()
    assert column.to_pylist() == [1, None, 3]
    assert column_of(np.array([1.0, np.nan], np.float32), pa.float32(), 0, "x").null_count == 0  # a NaN stays one


def test_objects_one_by_one():
    from decimal import Decimal

    assert column_of([Decimal("1.25"), None], pa.float64(), 0, "x").to_pylist() == [1.25, None]
    assert column_of([b"ab", None, np.bytes_(b"c")], pa.binary(), 0, "x").to_pylist() == [b"ab", None, b"c"]
    assert column_of(np.array([True, None], object), pa.bool_(), 0, "x").to_pylist() == [True, None]
    assert column_of([], pa.int64(), 2, "x").to_pylist() == []


@pytest.mark.parametrize(
    ("values", "kind", "ndim"),
    [
        ([np.zeros((2, 2))], pa.float64(), 1),  # other dimensions than declared
        (np.zeros((2, 2)), pa.float64(), 2),
        ([np.array([1.5])], pa.int32(), 1),  # would be cut off
        (np.array([2**40]), pa.int32(), 0),
        (["text"], pa.binary(), 0),
    ],
)
def test_values_that_are_not_what_the_schema_says_are_refused_by_name(values, kind, ndim):
    with pytest.raises(DataError, match=r"column 'x' cannot be read as .*leave the field out through fields="):
        column_of(values, kind, ndim, "x")
