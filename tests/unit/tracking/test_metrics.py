"""Round records read like rows, and survive JSON."""

from __future__ import annotations

import json
import math

import pytest

from sparkdeep.tracking.records import ReplicaRecord, RoundRecord, read_jsonl, write_jsonl


def record(**changes):
    part = ReplicaRecord(replica=0, host="h", rows=8, weight=8.0, steps=2, compute_seconds=0.5, input_seconds=0.1)
    return RoundRecord(
        **{"round": 1, "epoch": 1, "rows": 8, "loss": 0.5, "replicas": [part], "seconds": 2.0, **changes}
    )


def test_fields_are_attributes_and_items():
    one = record()
    assert one["loss"] == one.loss == 0.5
    assert dict(one)["rows"] == 8
    assert {**one}.keys() == set(one.keys())
    with pytest.raises(KeyError, match="losss"):
        one["losss"]
    with pytest.raises(KeyError):
        one["to_dict"]


def test_rows_a_second_of_a_round_that_took_no_time_is_zero():
    assert record().rows_per_second == 4.0
    assert record(seconds=0.0).rows_per_second == 0.0


def test_records_come_back_from_json_lines(tmp_path):
    records = [record(metrics={"loss": 0.25, "acc": 1.0}, state_reset=[1]), record(round=2)]
    write_jsonl(records, tmp_path / "r.jsonl")
    assert read_jsonl(tmp_path / "r.jsonl") == records
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 2


def test_a_number_that_is_not_finite_becomes_null_and_reads_back_as_nan(tmp_path):
    write_jsonl([record(loss=math.nan, metrics={"auc": math.inf})], tmp_path / "r.jsonl")
    (line,) = (tmp_path / "r.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    (back,) = read_jsonl(tmp_path / "r.jsonl")
    assert math.isnan(back.loss)
    assert math.isnan(back.metrics["auc"])
