"""petastorm's pickled schemas: every spelling that was written is read, and nothing of a pickle is ever run."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import pickle
import struct
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from petastorm_oracle import DATA

from sparkdeep.data.petastorm.unischema import KEY, read_metadata, read_unischema
from sparkdeep.errors import DataError

SCHEMAS = DATA / "schemas"
DESCRIBED = json.loads((SCHEMAS / "schema.json").read_text())
NAMES = sorted(path.stem for path in SCHEMAS.glob("*.pickle"))
GOOD = (SCHEMAS / "protocol2.pickle").read_bytes()
CODECS = {
    "ScalarCodec": "scalar",
    "NdarrayCodec": "ndarray",
    "CompressedNdarrayCodec": "compressed_ndarray",
    "CompressedImageCodec": "image",
    "NoneType": "none",
}
DTYPES = {"str_": "str", "bool_": "bool", "Decimal": "decimal"}


def read(data):
    return read_unischema(data, where="the schema")


def stored(name):
    return (SCHEMAS / f"{name}.pickle").read_bytes()


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("odd")])
def test_every_way_of_pickling_gives_the_schema_that_petastorm_had(name):
    schema = read(stored(name))
    assert schema.name == "Fields"
    assert [
        {"name": f.name, "dtype": f.dtype, "shape": list(f.shape), "nullable": f.nullable, "codec": f.codec}
        for f in schema.fields
    ] == [{**d, "dtype": DTYPES.get(d["dtype"], d["dtype"]), "codec": CODECS[d["codec"]]} for d in DESCRIBED]
    images = {f.name: f.codec_name for f in schema.fields if f.codec == "image"}
    assert images == {
        "gray": "CompressedImageCodec('png')",
        "color": "CompressedImageCodec('png')",
        "deep": "CompressedImageCodec('png')",
        "photo": "CompressedImageCodec('jpeg')",
    }


def test_the_variants_are_what_they_say():
    for name, text in [
        ("package0_protocol0", b"cav.experimental.deepdrive.dataset_toolkit.unischema\n"),
        ("package1_protocol2", b"cav.ml.dataset_toolkit.codecs\n"),
        ("restore_protocol2", b"cpyspark.serializers\n_restore\n"),
        ("protocol0", b"ccopy_reg\n_reconstructor\n"),
    ]:
        assert text in stored(name), name
    assert len({stored(name) for name in NAMES}) == len(NAMES) == 15


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("odd")])
def test_dtype_instances_numpy_sizes_and_plain_classes_are_read(name):
    fields = read(stored(name)).fields
    assert [(f.name, f.dtype, f.shape) for f in fields] == [
        ("a", "float32", (2, 3)),
        ("b", "str", ()),
        ("c", "datetime64", ()),
    ]


def test_metadata_holds_the_schema_and_the_stored_columns():
    schema, columns = read_metadata((DATA / "fields" / "_common_metadata").read_bytes(), where="_common_metadata")
    assert schema == read(GOOD)
    assert {f.name for f in schema.fields} - columns == {"part"}


def metadata(values):
    out = io.BytesIO()
    pq.write_metadata(pa.schema([("id", pa.int64())], metadata=values), out)
    return out.getvalue()


def test_metadata_without_a_schema_says_what_to_do():
    with pytest.raises(
        DataError, match=r"x holds no petastorm schema .*petastorm-generate-metadata.*spark.read.parquet"
    ):
        read_metadata(metadata({b"other": b"1"}), where="x")
    with pytest.raises(DataError, match="x is no Parquet metadata"):
        read_metadata(b"PAR1 and nothing", where="x")
    later, _ = read_metadata(metadata({b"dataset-toolkit.unischema.v2": GOOD}), where="x")
    assert later.name == "Fields"
    assert read_metadata(metadata({KEY: GOOD, b"a.unischema.v0": b"x"}), where="x")[0].name == "Fields"


# Pickles that would act if they were loaded.


@pytest.fixture
def trap(monkeypatch):
    """Whatever a pickle could reach and run, here notes that it was."""
    ran = []
    for owner, name in [(os, "system"), (os, "popen"), (builtins, "eval"), (builtins, "exec"), (subprocess, "Popen")]:
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: ran.append(args))
    return ran


class Calls:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def nested(protocol):
    return pickle.dumps({"_name": "x", "_fields": [("a", (1, [Calls(os.system, "touch x")]))]}, protocol)


POISONED = {
    **{f"os.system, protocol {p}": pickle.dumps(Calls(os.system, "touch x"), p) for p in range(6)},
    **{f"nested, protocol {p}": nested(p) for p in range(6)},
    "eval": b"c__builtin__\neval\n(S'1'\ntR.",
    "getattr": b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x08builtins\x8c\x04type\x93\x8c\x04mro\x86R.",
    "import by name": b"c__builtin__\n__import__\n(S'os'\ntR.",
    "INST": b"(S'touch x'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch x'\no.",
    "names from the memo": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93\x8c\x07touch x\x85R.",
    "name behind a dot": b"\x80\x04\x8c\x12petastorm.unischema\x8c\x10os.system.__call\x93.",
    "codec's module by a dot": b"\x80\x04\x8c\x10petastorm.codecs\x8c\x0ecv2.os.system \x93.",
    "numpy.load": b"cnumpy\nload\n(S'x'\ntR.",
    "numpy's eval": b"cnumpy.testing._private.utils\nrunstring\n(S'1'\nd tR.",
    "pyspark": b"cpyspark.serializers\nCPickleSerializer\n)R.",
    "torch": b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
    "class of the user": b"cmypackage.codecs\nMyCodec\n)\x81.",
    "after the schema": GOOD[:-1] + b"0cos\nsystem\n(S'touch x'\ntR.",
    "extension": b"\x80\x02\x82\x01.",
    "long extension": b"\x80\x02\x84\x01\x00\x00\x00.",
    "persistent id": b"Pos.system\n.",
    "binary persistent id": b"\x80\x02U\x01aQ.",
    "buffers": b"\x80\x05\x97.",
    "sets": b"\x80\x04\x8f.",
    "bytearrays": b"\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00a.",
}


@pytest.mark.parametrize("name", POISONED)
def test_a_poisoned_pickle_is_refused_and_nothing_runs(name, trap):
    with pytest.raises(DataError, match="nothing of it was run"):
        read(POISONED[name])
    assert trap == []


def test_the_trap_would_notice(trap):
    pickle.loads(b"cos\nsystem\n(S'touch x'\ntR.")
    assert trap == [("touch x",)]


def test_a_refused_global_is_named_with_the_remedy():
    with pytest.raises(DataError, match=r"the schema names 'os.system'.*Do not trust.*spark.read.parquet"):
        read(b"cos\nsystem\n(S'touch x'\ntR.")


def test_an_unknown_codec_of_petastorm_is_kept_by_name():
    schema = read(GOOD.replace(b"CompressedNdarrayCodec", b"SomeNewNdarrayCodec"))
    unknown = [f for f in schema.fields if f.codec is None]
    assert {f.name for f in unknown} == {"zipped", "zipped_ragged"}
    assert {f.codec_name for f in unknown} == {"SomeNewNdarrayCodec"}


def test_names_and_arguments_that_are_inert_make_no_schema(trap):
    for data in [
        b"N.",
        b"}.",
        b"cpetastorm.unischema\nUnischema\n)\x81.",
        b"cpetastorm.unischema\nUnischema\n)\x81}b.",
        b"cpetastorm.unischema\nUnischema\n)\x81}(S'_name'\nS'a'\nS'_fields'\n(lub.",
        b"cpetastorm.unischema\nUnischema\n)\x81}(S'_name'\nS'a'\nS'_fields'\n}S'a'\ncpetastorm.unischema\nUnischemaField\n)\x81sub.",
    ]:
        with pytest.raises(DataError, match="describes no petastorm schema"):
            read(data)
    assert trap == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"((.",
        b"N",
        b"NN.",
        b"h\x05.",
        b"\x80\x02N0.",
        b"N0" * 600_000 + b"N.",
        b"(" * 100_000 + b".",
        b"r\xff\xff\xff\x7f.",
        b"Nr\xff\xff\xff\x7f.",
        b"p-1\n.",
        b"I" + b"9" * 10_000 + b"\n.",
        b"\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
        b"X\xff\xff\xff\x7fx.",
        b"\x93.",
        b"NN\x93.",
        b"}]]s.",
        b"NR.",
        b"N)R.",
        b"N}b.",
        b"(o.",
        b"Na.",
        b"\x80\x63N.",
        b"x" * (17 << 20),
    ],
    ids=range(25),
)
def test_a_damaged_pickle_is_refused(data):
    with pytest.raises(DataError):
        read(data)


def test_a_value_nested_without_end_is_refused_and_ends_no_process():
    deep = b"\x80\x02" + b")" + b"\x85" * 300_000
    with pytest.raises(DataError):
        read(deep + b".")
    with pytest.raises(DataError, match="a key is a tuple"):
        read(b"}" + deep + b"Ns.")
    doubled = b")" + b"2\x86" * 5000  # each a pair of the one before: 2 ** 5000 values if anybody walked them
    for data in (doubled + b".", GOOD.replace(b"K\x05K\x07\x86", doubled)):
        with pytest.raises(DataError):
            read(data)


FORMS = [stored(name) for name in NAMES]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_change_of_bytes_is_read_or_refused(data):
    """A mutated schema gives a schema or DataError: no other error, no crash, no hang."""
    form = bytearray(data.draw(st.sampled_from(FORMS)))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(form) - 1))
        kind = data.draw(st.integers(0, 3))
        if kind == 0:
            form[at] = data.draw(st.integers(0, 255))
        elif kind == 1:
            del form[at : at + data.draw(st.integers(1, 40))]
        elif kind == 2:
            form[at:at] = data.draw(st.binary(min_size=1, max_size=12))
        else:
            end = at + data.draw(st.integers(1, 60))
            form[at:at] = form[at:end]
        if not form:
            break
    with contextlib.suppress(DataError):
        assert read(bytes(form)).fields


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data):
    with pytest.raises(DataError):
        read(data)
