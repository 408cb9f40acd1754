"""What the session's user does while a fit runs: cancels, unpersists, fits twice, transforms."""

from __future__ import annotations

import threading

import pytest
from fault_models import ROWS, LoseExecutor, estimator
from fault_runs import verified_rounds

from sparkdeep.errors import ReplicaLostError, ShardMismatchError, SparkdeepError
from sparkdeep.testing.injection import Injector

pytestmark = pytest.mark.cluster


@pytest.mark.fault(rows=[15], phases="TR")
def test_a_job_group_cancelled_from_outside_ends_the_fit_by_name_and_the_callers_group_stays(
    fault_session, fault_frame, reference, leaks, tmp_path
):
    context = fault_session.sparkContext
    names = ["spark.jobGroup.id", "spark.job.description", "spark.job.interruptOnCancel"]
    open_ = []

    def cancel(record):
        if record.round == 3:
            open_.append(leaks.left())
            threading.Thread(target=context.cancelJobGroup, args=("of the caller",)).start()

    options = {"checkpoint_dir": str(tmp_path / "checkpoints")}
    # Long enough a round for the cancellation to come in it.
    injector = Injector(tmp_path / "plan").delay_at("train", 4, 0, seconds=4.0)
    context.setJobGroup("of the caller", "what the caller does", interruptOnCancel=True)
    try:
        before = [context.getLocalProperty(name) for name in names]
        with pytest.raises(SparkdeepError, match="canceled from outside") as raised:
            estimator(injector, callbacks=[cancel], **options).fit(fault_frame)
        assert [context.getLocalProperty(name) for name in names] == before
    finally:
        for name in names:
            context.setLocalProperty(name, None)
    assert not isinstance(raised.value, ReplicaLostError)  # what somebody wanted is not repeated
    leaks.check()
    # The oracle does see what there is while a stage is open.
    assert {"jobs", "persisted", "folders", "processes", "sockets", "threads"} <= open_[0].keys()
    assert verified_rounds(tmp_path / "checkpoints")[-1] >= 3
    reference.check(estimator(injector, **options).fit(fault_frame))
    leaks.check()


@pytest.mark.slow_fault
@pytest.mark.fault(rows=[16], phases="TR")
def test_two_fits_at_once_of_which_one_is_struck_are_both_right(fault_frame, reference, leaks, tmp_path):
    injector = Injector(tmp_path / "plan").kill_at("train", 4, 1)
    models = {}

    def fit(name, options):
        models[name] = estimator(rounds_per_stage=2, **options).fit(fault_frame)

    with injector.installed():
        parts = [("struck", {"injector": injector}), ("other", {})]
        threads = [threading.Thread(target=fit, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=200)
    injector.check_fired()
    for name in ("struck", "other"):
        reference.check(models[name])
    assert sum(record.retries for model in models.values() for record in model.history) == 1
    leaks.check()


@pytest.mark.slow_fault
@pytest.mark.fault(rows=[37], phases="BT")
def test_shards_that_the_user_unpersists_are_written_again_to_the_same_bits(
    fault_session, fault_frame, reference, leaks
):
    java = fault_session.sparkContext._jsc.sc()
    dropped = []

    def drop(record):
        if record.round == 3 and not dropped:
            for number in leaks.left()["persisted"]:
                java.unpersistRDD(number, True)
                dropped.append(number)

    model = estimator(callbacks=[drop], rounds_per_stage=1).fit(fault_frame)
    assert dropped
    reference.check(model)
    leaks.check()


@pytest.mark.slow_fault
@pytest.mark.fault(rows=[30], phases="LD")
def test_rows_that_are_others_each_time_are_refused_when_an_executor_is_lost(
    fault_session, fault_frame, leaks, tmp_path
):
    from pyspark.sql import functions as F

    @F.udf("double")
    def noise():
        import os

        return int.from_bytes(os.urandom(2), "big") / 65536

    frame = fault_frame.withColumn("x", F.concat(F.slice("x", 1, 19), F.array(noise.asNondeterministic()())))
    injector = Injector(tmp_path / "plan").call_at("step", 3, 1, action=LoseExecutor())
    with injector.installed(), pytest.raises(ShardMismatchError) as raised:
        estimator(injector).fit(frame)
    injector.check_fired()
    message = str(raised.value)
    # Spark names an executor by the address that its connection came from, which on one machine is always the same.
    assert "replica " in message
    assert " on 127.0.0." in message
    assert "not deterministic" in message
    assert "write it to Parquet" in message
    leaks.check()


@pytest.mark.slow_fault
@pytest.mark.fault(rows=[40], phases="TF")
def test_a_worker_that_dies_in_transform_costs_a_task_and_every_row_comes_once(fault_frame, reference, leaks, tmp_path):
    injector = Injector(tmp_path / "plan").kill_at("transform")
    with injector.installed():
        model = estimator(injector, prediction="argmax").fit(fault_frame)
        struck = model.transform(fault_frame.repartition(4)).collect()
    injector.check_fired()
    reference.check(model)
    assert len(struck) == ROWS
    plain = model.transform(fault_frame).collect()
    assert sorted((row.x, row.y, row.prediction) for row in struck) == sorted(
        (row.x, row.y, row.prediction) for row in plain
    )
    leaks.check()
