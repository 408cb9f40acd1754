"""petastorm's codecs against the values that petastorm's own reader gave (tests/petastorm_data/make.py)."""

from __future__ import annotations

import io
import sys
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from petastorm_oracle import DATA, IMAGES, REFUSED, expected, same

from sparkdeep.data.columns import read_fields
from sparkdeep.data.faults import Faults
from sparkdeep.data.petastorm.codecs import FieldDecoder, decode_column
from sparkdeep.data.petastorm.unischema import UnischemaField, read_metadata
from sparkdeep.data.schema import ColumnType, build_schema
from sparkdeep.errors import ConfigError, DataError

SCHEMA, _ = read_metadata((DATA / "fields" / "_common_metadata").read_bytes(), where="_common_metadata")
FIELDS = {field.name: field for field in SCHEMA.fields}
ENCODED = [f.name for f in SCHEMA.fields if f.codec in ("ndarray", "compressed_ndarray") and f.name not in REFUSED]


@pytest.fixture(scope="module")
def want():
    return expected()


@pytest.fixture(scope="module")
def stored():
    parts = [pq.ParquetFile(path).read() for path in sorted((DATA / "fields").rglob("*.parquet"))]
    return pa.concat_tables(parts).sort_by("id").combine_chunks()


def whole(stored, name):
    chunked = stored.column(name).combine_chunks()
    return chunked.chunk(0) if isinstance(chunked, pa.ChunkedArray) else chunked


def field(codec="ndarray", dtype="float32", shape=(2, 3), name="x"):
    return UnischemaField(name=name, dtype=dtype, shape=shape, nullable=True, codec=codec, codec_name="NdarrayCodec")


def npy(value, **options):
    out = io.BytesIO()
    np.save(out, value, **options)
    return out.getvalue()


def npz(value, name="arr"):
    out = io.BytesIO()
    np.savez_compressed(out, **{name: value})
    return out.getvalue()


@pytest.mark.parametrize("name", ENCODED)
def test_arrays_equal_petastorms_values(name, stored, want):
    got = decode_column(whole(stored, name), FIELDS[name])
    same(name, got.to_pylist(), want[name])


@pytest.mark.parametrize("name", IMAGES)
def test_images_equal_petastorms_values(name, stored, want):
    pytest.importorskip("cv2", reason="sparkdeep[images] is not installed")
    got = decode_column(whole(stored, name), FIELDS[name])
    same(name, got.to_pylist(), want[name])
    assert decode_column(whole(stored, name)[3:5], FIELDS[name]).to_pylist() == got.to_pylist()[3:5]


@pytest.mark.parametrize("name", ["matrix", "matrix_u16", "columns_first", "zipped", "vector", "words"])
def test_a_slice_is_decoded_alone(name, stored, want):
    got = decode_column(whole(stored, name)[4:9], FIELDS[name])
    same(name, got.to_pylist(), want[name][4:9])
    assert len(decode_column(whole(stored, name)[:0], FIELDS[name])) == 0


def test_a_large_binary_column_and_a_column_of_nulls(stored, want):
    large = whole(stored, "matrix").cast(pa.large_binary())
    same("matrix", decode_column(large, FIELDS["matrix"]).to_pylist(), want["matrix"])
    for name in ("matrix_u16", "vector", "zipped"):
        assert decode_column(pa.array([None, None], pa.binary()), FIELDS[name]).to_pylist() == [None, None]


def test_rows_of_one_header_take_no_python_object_each(monkeypatch):
    values = np.arange(600, dtype=np.float32).reshape(100, 2, 3)
    array = pa.array([npy(value) for value in values])
    parsed = []
    read = np.lib.format.read_array_header_1_0
    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", lambda stream: parsed.append(1) or read(stream))
    got = decode_column(array, field())
    assert np.array_equal(np.array(got.to_pylist()), values)
    assert len(parsed) == 1
    # Rows that differ in length or order have a header each kind, not each row.
    mixed = pa.array([npy(np.asfortranarray(v) if i % 2 else v) for i, v in enumerate(values)])
    parsed.clear()
    assert np.array_equal(np.array(decode_column(mixed, field()).to_pylist()), values)
    assert len(parsed) <= 3


@pytest.mark.parametrize("dtype", [">f4", "<f4"])
def test_byte_order_is_mended(dtype):
    values = np.arange(12, dtype=dtype).reshape(2, 2, 3)
    for order in ("C", "F"):
        got = decode_column(pa.array([npy(np.asarray(v, order=order)) for v in values]), field())
        assert np.array_equal(np.array(got.to_pylist()), values)


class Boom:
    def __reduce__(self):
        return (sys.exit, (3,))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            npy(np.zeros((2, 3))),
            r"'x', row 1 of a batch: the value is float64; its schema says float32 of shape \(2, 3\)",
        ),
        (npy(np.zeros((3, 2), "f4")), r"the value has shape \(3, 2\)"),
        (npy(np.zeros(6, "f4")), r"the value has shape \(6,\)"),
        (npy(np.zeros((2, 3), "f4"))[:-1], "23 bytes are stored of shape"),
        (npy(np.zeros((2, 3), "f4")) + b"x", "25 bytes are stored of shape"),
        (npy(np.array([Boom()], object), allow_pickle=True), "the value is object"),
        (b"", "no numpy array"),
        (b"\x93NUMPY\x01\x00\xff\xff", "no numpy array"),
        (b"PK\x03\x04 and so on", "no numpy array"),
        (b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 117 + b"\n", "no numpy array"),
    ],
)
def test_a_damaged_array_is_refused_by_field_and_row(value, message):
    with pytest.raises(DataError, match=message):
        decode_column(pa.array([npy(np.zeros((2, 3), "f4")), value]), field())


def bomb():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr.npy", npy(np.zeros((2, 3), "f4")) + bytes(1 << 20))
    return out.getvalue()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (bomb(), "unpacks to 1048"),
        (npz(np.zeros((2, 3), "f4"), name="other"), "no compressed numpy array"),
        (npz(np.zeros((2, 3), "f4"))[:-30], "no compressed numpy array"),
        (npz(np.zeros((2, 3), "i4")), "the value is int32"),
        (b"nothing", "no compressed numpy array"),
    ],
)
def test_a_damaged_compressed_array_is_refused(value, message):
    with pytest.raises(DataError, match=message):
        decode_column(pa.array([npz(np.zeros((2, 3), "f4")), value]), field("compressed_ndarray"))


def test_a_damaged_image_is_refused():
    cv2 = pytest.importorskip("cv2", reason="sparkdeep[images] is not installed")
    kind = field("image", "uint8", (4, 4, 3))
    image = cv2.imencode(".png", np.zeros((4, 4, 4), np.uint8))[1].tobytes()
    for value, message in [(image, r"shape \(4, 4, 4\)"), (b"", "no image"), (b"\x89PNG rubbish", "no image")]:
        with pytest.raises(DataError, match=message):
            decode_column(pa.array([value]), kind)


def test_images_without_opencv_name_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match=r"install sparkdeep\[images\]"):
        decode_column(pa.array([b"x"]), field("image", "uint8", (4, 4, 3)))


def test_a_column_that_is_not_binary_is_refused():
    with pytest.raises(DataError, match="a column of int64 holds no encoded values"):
        decode_column(pa.array([1, 2]), field())


def fields_of(array, decoder, float_dtype="float32"):
    batch = pa.RecordBatch.from_arrays([array], names=["x"])
    types = {"x": ColumnType(kind="binary", dtype="bytes")}
    decode = {"x": decoder}
    schema = build_schema(
        types=types, feature_cols="x", label_cols=None, weight_col=None, decode=decode, float_dtype=float_dtype
    )
    faults = Faults()
    return read_fields(batch, schema, faults, decode)["features"], faults


@pytest.mark.parametrize(
    ("name", "dtype"), [("matrix", "float32"), ("columns_first", "float32"), ("zipped", "int16"), ("flags", "bool")]
)
def test_training_decodes_whole_columns_to_the_same_values_as_one_by_one(name, dtype, stored, want):
    decoder = FieldDecoder(FIELDS[name])
    got, faults = fields_of(whole(stored, name), decoder)
    faults.raise_if_any()
    assert got.dtype == dtype
    assert np.array_equal(got, np.stack(want[name]).astype(dtype))
    single, _ = fields_of(whole(stored, name), lambda data: decoder(data))
    assert single.dtype == got.dtype
    assert np.array_equal(single, got)


def test_training_keeps_small_integers_small():
    values = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    got, _ = fields_of(pa.array([npy(v) for v in values]), FieldDecoder(field(dtype="uint8")))
    assert got.dtype == np.uint8
    assert np.array_equal(got, values)
    wide = np.array([[65535, 1, 2]], np.uint16)
    got, _ = fields_of(pa.array([npy(wide)]), FieldDecoder(field(dtype="uint16", shape=(1, 3))))
    assert got.dtype == np.int32
    assert got.tolist() == [wide.tolist()]


def test_training_counts_missing_values_and_nans():
    values = [npy(np.full((2, 3), np.nan, "f4")), None, npy(np.zeros((2, 3), "f4"))]
    got, faults = fields_of(pa.array(values, pa.binary()), FieldDecoder(field()))
    assert np.array_equal(got, np.zeros((3, 2, 3)))
    with pytest.raises(DataError, match="null"):
        faults.raise_if_any()


def test_training_refuses_encoded_rows_of_different_length():
    with pytest.raises(DataError, match="read it decoded"):
        FieldDecoder(FIELDS["vector"]).rows(pa.array([npy(np.zeros(3, np.int32))]))
