"""Targets on disk: shards, samples, owner files, round records, the exchange directory, petastorm's metadata."""

from __future__ import annotations

import json
import shutil
from functools import partial

import numpy as np
from fuzz_lines import update
from fuzzing import Target
from mutating import json_text, mutate_bytes, mutate_json, mutate_json_text, mutate_pickle, mutate_tensors
from paths import SUPPORT
from safetensors.numpy import save

from sparkdeep.data.arrow import Ragged
from sparkdeep.data.petastorm.unischema import read_metadata, read_unischema
from sparkdeep.data.sample import decode_rows, encode_rows
from sparkdeep.data.schema import Field, Schema
from sparkdeep.data.scratch import Owner, is_dead, owner_of_this_process, sweep
from sparkdeep.data.shard_maps import SPLITS
from sparkdeep.data.shards import Shard, ShardWriter
from sparkdeep.protocol.exchange import Exchange
from sparkdeep.tracking.records import ReplicaRecord, RoundRecord, read_jsonl, write_jsonl

PETASTORM = SUPPORT / "petastorm_data"


def lay_down(folder, files):
    """Make `folder` hold these files and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(data)


def picked_up(folder):
    """The files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- shards -----------------------------------------------------------------------------------------------------------


def fields():
    """5 rows: numbers, images, flags, and rows of different length."""
    rng = np.random.default_rng(0)
    return {
        "features": rng.random((5, 2, 3), np.float32),
        "features.words": Ragged(np.arange(9), np.array([2, 0, 4, 3, 0])),
        "label": rng.integers(0, 9, 5),
        "weight": rng.random(5),
    }


def schema():
    """Of `fields`."""
    kinds = {"features": "float32", "features.words": "int64", "label": "int64", "weight": "float64"}
    return Schema(
        fields=tuple(
            Field(
                name=name,
                role=name.partition(".")[0],
                argument=name.partition(".")[2] or None,
                columns=(name,),
                stacked=False,
                dtype=dtype,
                ragged=name == "features.words",
                shape=(2, 3) if name == "features" else (),
            )
            for name, dtype in kinds.items()
        )
    )


def shard_files(folder):
    """A shard's files."""
    with ShardWriter(folder, schema()) as writer:
        writer.append("train", fields())
        writer.append("validation", fields())
        writer.close()
    return picked_up(folder)


def read_shard(folder, files):
    """Open it, and take rows in each way that there is."""
    lay_down(folder, files)
    shard = Shard.open(folder)
    for split in SPLITS:
        rows = shard.info.rows[split]
        if rows:
            shard.take(split, np.array([rows - 1, 0]))
            shard.take(split, np.arange(min(rows, 100)))
            shard.will_need(split, 0, min(rows, 100))
    shard.head(3)
    shard.close()


def mutate_shard(rng, files):
    """The manifest, or a column's values, changed; often with sizes that fit each other again."""
    files = dict(files)
    columns = sorted(name for name in files if name.endswith(".bin"))
    if rng.random() < 0.35:
        name = rng.choice(columns)
        data = mutate_bytes(rng, files[name])
        files[name] = data[: len(files[name])].ljust(len(files[name]), b"\0") if rng.random() < 0.7 else data
        return files
    if rng.random() < 0.1:
        del files[rng.choice(sorted(files))]
        return files
    if rng.random() < 0.4:
        manifest = json.loads(files["shard.json"])
        place = rng.choice((manifest["schema"]["fields"], manifest["info"]["rows"], manifest["files"]))
        key = rng.choice(range(len(place)) if isinstance(place, list) else list(place))
        place[key] = mutate_json(rng, place[key])
        files["shard.json"] = json_text(manifest)
        return files
    files["shard.json"] = mutate_json_text(rng, files["shard.json"])
    return files


def shard_cases(folder):
    """Manifests, and a column, that only a hand or a bad disk can have written."""
    files = picked_up(folder)
    manifest = json.loads(files["shard.json"])

    def with_field(**changes):
        first, *others = manifest["schema"]["fields"]
        return {**manifest, "schema": {**manifest["schema"], "fields": [{**first, **changes}, *others]}}

    rows = {"train": -1, "validation": 5}
    made = [
        with_field(dtype="i4,f8"),
        with_field(dtype="O"),
        with_field(name="../../x"),
        with_field(name="x" * 5000),
        with_field(shape=[2**62, 4]),
        with_field(shape=[0, 2**62]),
        with_field(shape="x"),
        {**manifest, "files": {"../../../etc/passwd": 1}},
        {**manifest, "files": {**manifest["files"], "train.label.bin": "x"}},
        {**manifest, "info": {**manifest["info"], "rows": rows}},
        {**manifest, "info": {**manifest["info"], "seen": {"a": "b"}}},
        [manifest],
    ]
    texts = [json_text(one) for one in made] + [b"[" * 100_000, b'{"format": ' + b"9" * 5000]
    offsets = np.array([0, 2, 2, 2**60, 9, 9], "<i8").tobytes()
    return [*({**files, "shard.json": text} for text in texts), {**files, "train.features.words.offsets.bin": offsets}]


def read_sample(data):
    """Rows as the driver gets them; ragged ones are parted."""
    for value in decode_rows(data).values():
        if isinstance(value, Ragged):
            np.split(value.values, np.cumsum(value.lengths))


# -- owners -----------------------------------------------------------------------------------------------------------


def read_owner(folder, data):
    """Sweep a folder whose owner file says this, and judge the owner."""
    root = folder / "a" / "b" / "c" / "d"  # its ancestors are looked at too, and /tmp may be full
    claimed = root / "sparkdeep-run"
    lay_down(claimed, {"owner.json": data, "shard/x.bin": b"x"})
    sweep([str(root)])
    try:
        owner = Owner.from_json(json.loads(data))
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    is_dead(owner)


def mutate_owner(rng, data):
    """The owner's record, or, where it is no JSON, its bytes."""
    return mutate_json_text(rng, data) if data[:1] == b"{" else mutate_bytes(rng, data)


# -- records and updates ----------------------------------------------------------------------------------------------


def records():
    """Two rounds."""
    part = ReplicaRecord(replica=0, host="h", rows=8, weight=8.0, steps=2, compute_seconds=0.1, input_seconds=0.0)
    return [
        RoundRecord(round=n, epoch=1, rows=8, loss=0.5, metrics={"loss": 0.4}, seconds=1.0, replicas=[part])
        for n in (1, 2)
    ]


def read_records(folder, data):
    """Read the file, and report on it."""
    path = folder / "rounds.jsonl"
    path.write_bytes(data)
    read_jsonl(path)


def mutate_lines(rng, data):
    """JSON lines, one of them changed."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutate_json_text(rng, lines[at])
    return b"\n".join(lines) + rng.choice((b"", b"\n", b"\n\n"))


def read_update(folder, files):
    """One replica's update in the exchange directory."""
    lay_down(folder / "sparkdeep-run" / "job", files)
    exchange = Exchange(str(folder), "run", "job")
    (found,), _ = exchange.headers(1, timeout_s=0.0, check=lambda: None)
    exchange.body(0, found.buffer_bytes)


def mutate_update(rng, files):
    """The header changed; the body is only measured."""
    return {**files, "update-00000-header": mutate_json_text(rng, files["update-00000-header"])}


# -- petastorm --------------------------------------------------------------------------------------------------------


def targets(folder):
    """Those of this file."""
    sample = encode_rows(fields())
    scalar = save({"x": np.array(3.0)})
    uneven = encode_rows({"x": Ragged(np.arange(4), np.array([2**62, -(2**62), 3]))})
    header = json.dumps({"host": "h", "update": update(b"12345678")}).encode()
    write_jsonl(records(), folder / "rounds.jsonl")
    pickles = [path.read_bytes() for path in sorted((PETASTORM / "schemas").glob("*.pickle"))]
    return [
        Target(
            name="shard",
            seeds=[shard_files(folder / "made")],
            cases=shard_cases(folder / "made"),
            mutate=mutate_shard,
            read=partial(read_shard, folder / "shard"),
            share=2.0,
        ),
        Target(name="sample", seeds=[sample], cases=[scalar, uneven], mutate=mutate_tensors, read=read_sample),
        Target(
            name="owner",
            seeds=[
                json.dumps(owner_of_this_process().to_json()).encode(),
                # An owner that cannot be judged keeps its folder: no reader raises.
                b"[" * 4000,
                json.dumps({**owner_of_this_process().to_json(), "pid": 10**400}).encode(),
            ],
            mutate=mutate_owner,
            read=partial(read_owner, folder / "owner"),
        ),
        Target(
            name="records",
            seeds=[(folder / "rounds.jsonl").read_bytes()],
            cases=[
                b"\xff",
                b"[]",
                b"[" * 100_000,
                b'{"round": 1}',
                b'{"round": ' + b"9" * 5000 + b"}",
                b'{"replicas": [1]}',
            ],
            mutate=mutate_lines,
            read=partial(read_records, folder),
        ),
        Target(
            name="exchange",
            seeds=[{"update-00000-header": header, "update-00000-body": b"12345678"}],
            cases=[
                {"update-00000-header": text}
                for text in (b"\xff", b"[]", b"[" * 100_000, b'{"host": "h"}', b'{"update": 3, "host": "h"}')
            ],
            mutate=mutate_update,
            read=partial(read_update, folder / "exchange"),
        ),
        Target(
            name="pickled-schema",
            seeds=pickles,
            mutate=mutate_pickle,
            read=partial(read_unischema, where="the schema"),
        ),
        Target(
            name="parquet-metadata",
            seeds=[(PETASTORM / "fields" / "_common_metadata").read_bytes()],
            mutate=mutate_bytes,
            read=partial(read_metadata, where="the metadata"),
        ),
    ]
