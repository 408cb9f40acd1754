"""Rounds in barrier stages: callbacks, grouping, resuming, stopping, replicas' words."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from spark_models import WITH_STATE, Chatty, blob_rows, estimator, same_bits, slowly, weights

from sparkdeep import EarlyStopping
from sparkdeep.errors import CheckpointError, SparkdeepError

pytestmark = pytest.mark.spark


class Stopped(Exception):
    pass


def raise_at(number):
    def callback(record):
        if record.round == number:
            raise Stopped

    return callback


def test_a_callback_that_needs_spark_can_run_a_job_and_another_ends_the_run(spark, blobs):
    counts = []

    def count(record):
        counts.append(spark.range(10).count())

    count.needs_spark = True
    model = estimator(callbacks=[count, lambda record: record.round == 2], epochs=4).fit(blobs)
    assert counts == [10, 10]
    assert [record.round for record in model.history] == [1, 2]
    assert all(record.stage_seconds > 0 for record in model.history)  # closed for the callback, opened again
    assert min(vars(model.startup).values()) > 0
    assert model.startup.opening_s >= model.history[0].stage_seconds


def test_grouping_rounds_in_stages_changes_no_bit(blobs, with_state):
    single = estimator(rounds_per_stage=1, **WITH_STATE).fit(blobs)
    grouped = with_state
    other = estimator(rounds_per_stage="auto", **WITH_STATE, seed=1).fit(blobs)
    assert len(single.history) > 2
    assert all(record.stage_seconds > 0 for record in single.history)
    assert sum(record.stage_seconds > 0 for record in grouped.history) < len(grouped.history)
    assert same_bits(weights(single), weights(grouped))
    assert [r.loss for r in single.history] == [r.loss for r in grouped.history]
    assert not same_bits(weights(single), weights(other))


def test_what_a_replica_prints_reaches_the_driver(blobs, capsys):
    estimator(model=Chatty, buffers={"said": "local"}).fit(blobs)
    printed = capsys.readouterr().out
    for replica in (0, 1):
        assert f"[replica {replica}] hello from process" in printed


def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(blobs, with_state, tmp_path):
    options = {**WITH_STATE, "checkpoint_every": 2}
    whole = with_state
    with pytest.raises(Stopped):
        estimator(checkpoint_dir=str(tmp_path / "run"), callbacks=[raise_at(3)], **options).fit(blobs)
    rounds = []
    resumed = estimator(
        checkpoint_dir=str(tmp_path / "run"), resume="auto", callbacks=[lambda r: rounds.append(r.round)], **options
    ).fit(blobs)
    assert rounds[0] == 3  # round 2 was the newest checkpoint
    assert same_bits(weights(whole), weights(resumed))
    assert [r.loss for r in whole.history] == [r.loss for r in resumed.history]
    again = estimator(checkpoint_dir=str(tmp_path / "run"), resume=False, **options).fit(blobs)
    assert [r.round for r in again.history] == [r.round for r in whole.history]
    assert same_bits(weights(whole), weights(again))


@pytest.mark.fault(rows=[25], phases="RS")
def test_a_checkpoint_of_other_rows_is_refused(spark, blobs, tmp_path):
    options = {"checkpoint_dir": str(tmp_path / "run"), "checkpoint_every": 1}
    with pytest.raises(Stopped):
        estimator(callbacks=[raise_at(1)], **options).fit(blobs)
    other = spark.createDataFrame(blob_rows(200, seed=1), blobs.schema)
    with pytest.raises(CheckpointError, match="shards"):
        estimator(**options).fit(other)


def test_an_outer_optimizer_steps_on_the_mean(blobs, plain):
    nesterov = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
    outer = estimator(outer_optimizer=nesterov, epochs=4, sync_every=2).fit(blobs)
    inner = estimator(epochs=4, sync_every=2).fit(blobs)
    assert outer.history[-1].loss < outer.history[0].loss
    assert not same_bits(weights(outer), weights(inner))
    one = estimator(outer_optimizer=partial(torch.optim.SGD, lr=1.0)).fit(blobs)
    assert all(torch.allclose(weights(one)[k], v, atol=1e-6) for k, v in weights(plain).items())


def test_early_stopping_returns_the_best_round(blobs):
    # A learning rate of its own class: from round 3 on it climbs, and the validation loss with it.
    best = EarlyStopping(patience=2)
    schedule = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: -1.0 if step >= 6 else 1.0)
    model = estimator(
        epochs=8, sync_every=3, validation=0.2, validate_every=1, early_stopping=best, lr_scheduler=schedule
    ).fit(blobs)
    losses = [record.metrics["loss"] for record in model.history]
    assert losses.index(min(losses)) + 1 + 2 == len(losses) < 16
    # Stopping there by hand gives that round's parameters; the last round's are others.
    stopped = {
        number: estimator(
            epochs=8,
            sync_every=3,
            validation=0.2,
            lr_scheduler=schedule,
            callbacks=[lambda record, number=number: record.round == number],
        ).fit(blobs)
        for number in (losses.index(min(losses)) + 1, len(losses))
    }
    best_round, last_round = stopped.values()
    assert same_bits(weights(model), weights(best_round))
    assert not same_bits(weights(model), weights(last_round))


def test_a_torchmetric_is_merged_over_replicas_and_a_function_is_given_all_rows(blobs):
    torchmetrics = pytest.importorskip("torchmetrics")
    metrics = {
        "accuracy": torchmetrics.Accuracy(task="multiclass", num_classes=3),
        "share": lambda output, label: (output.argmax(1) == label).float().mean(),
        "rows": lambda output, label: len(output),
    }
    model = estimator(epochs=3, validation=0.3, metrics=metrics).fit(blobs)
    scores = model.history[-1].metrics
    assert 40 < scores["rows"] < 80
    assert scores["accuracy"] == pytest.approx(scores["share"], abs=1e-6)
    assert scores["accuracy"] > 0.8


@pytest.mark.fault(rows=[15], phases="TR")
def test_a_job_that_is_cancelled_from_outside_ends_the_fit(spark, blobs):
    rounds = []

    def cancel(record):
        rounds.append(record.round)
        spark.sparkContext.cancelAllJobs()

    with pytest.raises(SparkdeepError, match=r"canceled from outside.*not repeated"):
        estimator(epochs=20, sync_every=2, callbacks=[cancel], preprocess=slowly).fit(blobs)
    assert len(rounds) < 40  # of 80
