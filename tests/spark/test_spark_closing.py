"""Rounds that close by quorum or by seconds, where replicas are tasks; a shared shard folder dealt anew."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from spark_models import estimator, slowly, weights

from sparkdeep.data.schema import build_schema
from sparkdeep.spark.fit.settings import FitSettings
from sparkdeep.spark.fit.shard_source import ShardSource
from sparkdeep.spark.session.types import column_types
from sparkdeep.testing.injection import Injector

pytestmark = pytest.mark.spark


class WaitsFor:
    """Until a file is there, a minute at most."""

    def __init__(self, path):
        self.path = str(path)

    def __call__(self):
        deadline = time.monotonic() + 60
        while not Path(self.path).exists() and time.monotonic() < deadline:
            time.sleep(0.02)


@pytest.mark.fault(rows=[11], phases="TR")
def test_a_round_goes_on_without_the_slowest_task_and_the_record_names_it(blobs, tmp_path):
    closed = tmp_path / "closed"
    injector = Injector(tmp_path / "plan").call_at("train", 2, 1, action=WaitsFor(closed))

    def tell(record):
        if record.round == 2:
            closed.touch()

    options = {"quorum": 1, "quorum_grace_s": 2.0, "epochs": 4, "sync_every": 3, "rounds_per_stage": 1000}
    model = estimator(preprocess=injector.carrier(), callbacks=[tell], **options).fit(blobs)
    injector.check_fired()
    by_round = {record.round: [part.dropped for part in record.replicas] for record in model.history}
    assert by_round[1] == ["", ""]
    assert by_round[2] == ["", "late"]
    assert model.history[1].rows == model.history[1].replicas[0].rows > 0
    assert all(torch.isfinite(value).all() for value in weights(model).values())


def test_rounds_of_seconds_see_every_row_once_an_epoch(blobs):
    model = estimator(time_budget_s=0.05, epochs=2, preprocess=slowly).fit(blobs)
    assert sum(record.rows for record in model.history) == 2 * blobs.count()
    assert len(model.history) > 2
    assert model.history[-1].epoch == 2


def test_shards_on_shared_storage_are_dealt_anew_without_another_look_at_the_source(spark, blobs, tmp_path):
    seen = spark.sparkContext.accumulator(0)

    def look(rows):
        for row in rows:
            seen.add(1)
            yield row

    frame = spark.createDataFrame(blobs.rdd.mapPartitions(look), blobs.schema)
    made = estimator(shard_dir=str(tmp_path / "shared"), validation=0.2)
    settings: FitSettings = made.settings()
    schema = build_schema(
        types=column_types(frame.schema, ["pixels", "label"]),
        feature_cols=settings.feature_cols,
        label_cols=settings.label_cols,
        weight_col=None,
        float_dtype="float32",
        decode=None,
        collate=None,
    )
    source = ShardSource(frame, settings, schema, run="redealt", profile=None, on_busy=lambda: None)
    try:
        first = source.ingest().facts
        looked = seen.value
        (one,) = source.resize(1)
        assert seen.value == looked >= blobs.count()
        assert one.rows == {split: sum(fact.rows[split] for fact in first) for split in ("train", "validation")}
        assert source.resize(2) == first
    finally:
        source.close()
