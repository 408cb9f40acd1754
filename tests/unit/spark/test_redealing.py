from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from twin import deal, schema_of, write_shards

pytest.importorskip("pyspark")

from sparkdeep.data.shards import Shard
from sparkdeep.spark.ingest.tasks import RedealJob, _copied, stretches


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 7))
def test_stretches_are_even_and_every_row_is_in_one_in_its_order(rows, count):
    parts = [[(shard, i) for shard, a, b in stretches(rows, n, count) for i in range(a, b)] for n in range(count)]
    assert [row for part in parts for row in part] == [(shard, i) for shard, own in enumerate(rows) for i in range(own)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_rows_of_three_shards_lie_in_two_in_the_same_order_with_their_weights(tmp_path):
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(31, 3)).astype(np.float32), np.arange(31.0)[:, None], rng.random(31)
    parts = deal(x, y, [9, 12, 10], w)
    held_out = deal(-x[:6], -y[:6], [2, 0, 4], w[:6])
    schema = schema_of(x, y, w)
    folders = write_shards(tmp_path / "three", parts, schema, held_out)
    rows = [{"train": len(p["label"]), "validation": len(v["label"])} for p, v in zip(parts, held_out, strict=True)]
    shards = tuple(zip(map(str, folders), rows, strict=True))
    job = RedealJob(run="r", schema=schema, shard_dir=str(tmp_path), shards=shards, count=2)
    labels, weight = {"train": [], "validation": []}, 0.0
    for number in range(2):
        _, own = _copied(job, number, tmp_path / f"new-{number}")
        weight += own
        with contextlib.closing(Shard.open(tmp_path / f"new-{number}")) as shard:
            for split, found in labels.items():
                taken = shard.take(split, np.arange(shard.info.rows[split]))
                found.append(taken["label"][:, 0])
    assert [len(part) for part in labels["train"]] == [15, 16]
    np.testing.assert_array_equal(np.concatenate(labels["train"]), y[:, 0])
    np.testing.assert_array_equal(np.concatenate(labels["validation"]), -y[:6, 0])
    assert weight == pytest.approx(w.sum())
