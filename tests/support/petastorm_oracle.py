"""What petastorm's own reader made of tests/petastorm_data/fields, and the same shape of what ours makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "petastorm_data"
REFUSED = ("cloud", "waves")
IMAGES = ("gray", "color", "deep", "photo")
# Where Spark has no such type, the next larger one holds every value.
WIDENED = {"uint8": "int16", "uint16": "int32", "uint32": "int64", "float16": "float32"}


def expected():
    """Field to the list of its values by id: numpy arrays or scalars, None where missing."""
    stored = np.load(DATA / "fields.npz", allow_pickle=False)
    out = {}
    for name in [key for key in stored.files if "." not in key]:
        values = stored[name]
        if f"{name}.lengths" in stored:
            values = np.split(values, np.cumsum(stored[f"{name}.lengths"])[:-1])
        present = iter(values)
        out[name] = [None if missing else next(present) for missing in stored[f"{name}.missing"]]
    # petastorm reads by pandas, which has NaN for a missing float; no value of the dataset is NaN.
    out["f64"] = [None if np.isnan(value) else value for value in out["f64"]]
    assert sum(value is None for value in out["f64"]) == 4
    return out


def same(name, got, want):
    """Hold Python values (nested lists, as Arrow gives them) to petastorm's, bit for bit, in the widened type."""
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert (ours is None) == (theirs is None), name
        if theirs is None:
            continue
        theirs = np.asarray(theirs)
        if name == "money":
            assert str(ours) == str(theirs), name
            continue
        if theirs.dtype.kind == "M":
            ours = [value.replace(tzinfo=None) if hasattr(value, "tzinfo") else value for value in np.atleast_1d(ours)]
            ours = np.array(ours, "M8[us]").reshape(theirs.shape)
        ours = np.array(ours)
        wanted = theirs.astype(WIDENED.get(theirs.dtype.name, theirs.dtype))
        assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
        if theirs.dtype.kind in "iufb":
            np.testing.assert_array_equal(ours.astype(wanted.dtype), wanted, err_msg=name, strict=True)
        else:
            assert ours.tolist() == theirs.tolist(), name
