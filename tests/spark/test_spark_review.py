"""Settings that would train something else than was meant, or wait for ever, are refused by name."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from spark_models import estimator, weights
from torch import nn

from sparkdeep import CheckpointError, ConfigError, DataError, ReplicaLostError
from sparkdeep.spark.fit import training

pytestmark = pytest.mark.spark


def test_validation_without_a_single_row_is_refused(blobs):
    with pytest.raises(DataError, match="none of the 200 rows is for validation"):
        estimator(validation=0.000001).fit(blobs)


def test_weights_that_are_all_zero_are_refused(blobs):
    with pytest.raises(DataError, match="weights in weight_col are all zero"):
        estimator(weight_col="w").fit(blobs.selectExpr("*", "0.0 AS w"))


def test_a_warm_start_must_be_a_model_of_ours(blobs):
    with pytest.raises(ConfigError, match=r"warm_start is a Linear; give the TorchModel"):
        estimator().fit(blobs, warm_start=nn.Linear(1, 1))


def test_a_prediction_column_that_training_reads_is_refused_at_once():
    with pytest.raises(ConfigError, match="prediction_col='label' is a column that training reads"):
        estimator(prediction_col="label")


@pytest.mark.fault(rows=[25], phases="RS")
def test_resuming_with_another_optimizer_is_refused_with_both_and_the_same_call_returns_the_model(blobs, tmp_path):
    first = estimator(epochs=1, checkpoint_dir=tmp_path).fit(blobs)
    again = estimator(epochs=1, checkpoint_dir=Path(tmp_path)).fit(blobs)
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(again).values(), strict=True))
    with pytest.raises(CheckpointError, match=r"(?s)optimizer.*0\.123"):
        estimator(epochs=1, checkpoint_dir=tmp_path, optimizer=partial(torch.optim.SGD, lr=0.123)).fit(blobs)
    with pytest.raises(CheckpointError, match="warm_start"):
        estimator(epochs=1, checkpoint_dir=tmp_path).fit(blobs, warm_start=first)
    fresh = estimator(epochs=1, checkpoint_dir=tmp_path, resume=False, optimizer=partial(torch.optim.SGD, lr=0.123))
    assert fresh.fit(blobs).history[0].round == 1


def test_slots_that_others_hold_are_waited_for_until_a_deadline(spark, blobs, tmp_path, monkeypatch):
    given_up = tmp_path / "given up"
    clean = training.clean_executors

    def told(*arguments, **options):
        given_up.touch()  # the slots are held for a moment more, so that the clean-up waits for them
        return clean(*arguments, **options)

    monkeypatch.setattr(training, "clean_executors", told)

    def hog(batches):
        numbers = [row.as_py() for batch in batches for row in batch.column(0)]
        (tmp_path / f"{numbers[0]}").touch()
        deadline = time.monotonic() + 60
        while not given_up.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        return iter(())

    busy = threading.Thread(target=lambda: spark.range(0, 2, 1, 2).mapInArrow(hog, "id long").collect())
    busy.start()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    began = time.monotonic()
    try:
        with pytest.raises(ReplicaLostError, match=r"(?s)ingest had no running task for 1 s.*open_timeout_s"):
            estimator(open_timeout_s=1.0, max_retries=0).fit(blobs)
        assert given_up.exists()
    finally:
        given_up.touch()
        busy.join()
    assert time.monotonic() - began < 90  # the clean-up waited for slots too, under its own deadline


def test_shared_shards_train_to_the_same_bits_and_are_cleaned(blobs, plain, tmp_path):
    shared = weights(estimator(shard_dir=str(tmp_path), rounds_per_stage=1).fit(blobs))
    local = weights(plain)
    assert all(torch.equal(a, b) for a, b in zip(shared.values(), local.values(), strict=True))
    assert list(tmp_path.iterdir()) == []
