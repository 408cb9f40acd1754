"""What transport="spark" keeps on every kind of session; test modules import these and give `spark` and `blobs`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import cloudpickle
import pyarrow as pa
import pytest
import torch
from transport_models import Armed, Wide, arms, estimator, same_bits

from sparkdeep.errors import (
    ConfigError,
    NonFiniteError,
    PreflightError,
    ReplicaLostError,
    UserCodeError,
)
from sparkdeep.settings.run import EarlyStopping

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def folders_left(spark):
    """sparkdeep's folders in the executors' local directories."""

    def look(batches):
        for _ in batches:
            pass
        found = [
            str(path)
            for folder in os.environ["SPARK_LOCAL_DIRS"].split(",")
            for path in Path(folder).glob("sparkdeep-*")
        ]
        yield pa.RecordBatch.from_pydict({"path": pa.array(found, pa.string())})

    return [row.path for row in spark.range(0, 1, 1, 1).mapInArrow(look, "path string").collect()]


def test_the_users_exception_comes_first_with_replica_and_host(blobs, tmp_path):
    trap = tmp_path / "trap"
    with pytest.raises(UserCodeError, match=r"^Traceback") as caught:
        estimator(model_args={"armed": trap, "trouble": "raise"}, callbacks=[arms(trap)]).fit(blobs)
    assert "LookupError: the trap was armed" in str(caught.value)
    assert caught.value.replica in (0, 1)
    assert caught.value.host
    assert "in act" in caught.value.traceback_text


def test_a_loss_that_is_not_finite_names_its_round(blobs, tmp_path):
    trap = tmp_path / "trap"
    with pytest.raises(NonFiniteError) as caught:
        estimator(model_args={"armed": trap, "trouble": "nan"}, callbacks=[arms(trap)]).fit(blobs)
    assert caught.value.round == 2


@pytest.fixture(scope="module")
def undisturbed(blobs):
    """What a fit gives to which nothing happens."""
    return estimator(validation=0.1).fit(blobs)


@pytest.mark.parametrize("exchanged", [False, True])
def test_a_round_whose_worker_is_killed_is_repeated_to_the_same_bits(spark, blobs, undisturbed, tmp_path, exchanged):
    trap, exchange = tmp_path / "trap", tmp_path / "exchange"
    options = {"exchange_dir": str(exchange) if exchanged else None, "validation": 0.1}
    model = estimator(model_args={"armed": trap, "trouble": "kill"}, callbacks=[arms(trap)], **options).fit(blobs)
    assert [record.retries for record in model.history][:2] == [0, 1]
    assert not any(record.state_reset for record in model.history)
    assert same_bits(model, undisturbed)
    assert folders_left(spark) == []
    assert list(exchange.glob("*")) == []


def test_a_replica_that_hangs_ends_by_itself_and_the_round_is_repeated(blobs, tmp_path):
    # Longer than the first batch of a new process takes anywhere: torch loads much of itself in it.
    trap = tmp_path / "trap"
    model = estimator(model_args={"armed": trap, "trouble": "hang"}, callbacks=[arms(trap)], stall_timeout_s=15.0).fit(
        blobs
    )
    assert [record.retries for record in model.history][:2] == [0, 1]


def test_a_stopped_process_is_cancelled_by_the_deadline(blobs, tmp_path, monkeypatch):
    # A stopped process cannot even watch itself. It stops in the second round, when everything it needs has been loaded.
    pids, trap = tmp_path / "pids", tmp_path / "trap"

    def arm(record):
        if record.round == 1:
            monkeypatch.setattr("sparkdeep.stages.jobs._PATIENCE", 0)  # what is left is open_timeout_s
            trap.write_text("armed")

    def tell(features):
        try:
            trap.unlink()
        except FileNotFoundError:
            return features
        pids.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
        return features

    with pytest.raises(ReplicaLostError, match=r"did not end within|had no running task"):
        estimator(augment=tell, callbacks=[arm], open_timeout_s=15.0, stall_timeout_s=30.0, max_retries=0).fit(blobs)
    pid = int(pids.read_text())
    assert pid > 1
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


def test_ctrl_c_frees_the_slots(spark, blobs, tmp_path):
    def interrupt(record):
        threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()

    def slowly(features):
        time.sleep(0.5)
        return features

    with pytest.raises(KeyboardInterrupt):
        estimator(augment=slowly, callbacks=[interrupt], sync_every=1000, epochs=30).fit(blobs)
    began = time.monotonic()
    assert spark.range(0, 2, 1, 2).mapInArrow(_pass, "id long", barrier=True).count() == 2
    assert time.monotonic() - began < 60


def _pass(batches):
    yield from batches


def test_a_run_goes_on_from_its_checkpoint_and_stops_early(blobs, tmp_path):
    options = {
        "validation": 0.2,
        "validate_every": 1,
        "checkpoint_dir": str(tmp_path / "checkpoints"),
        "checkpoint_every": 2,
        "replica_state": "durable",
        "early_stopping": EarlyStopping(patience=50),
    }
    whole = estimator(**{**options, "checkpoint_dir": None, "epochs": 2}).fit(blobs)
    estimator(**options, epochs=1).fit(blobs)
    resumed = estimator(**options, epochs=2).fit(blobs)
    assert len(resumed.history) == len(whole.history)
    assert same_bits(resumed, whole)
    stopped = estimator(
        **{**options, "checkpoint_dir": None, "epochs": 9, "early_stopping": EarlyStopping(patience=1, min_delta=9.0)}
    ).fit(blobs)
    assert len(stopped.history) == 2


def test_what_replicas_print_is_seen(blobs, tmp_path, capfd):
    trap = tmp_path / "trap"
    trap.write_text("armed")
    estimator(model_args={"armed": trap, "trouble": "print"}).fit(blobs)
    captured = capfd.readouterr()
    assert "the trap was armed" in captured.out + captured.err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rounds_per_stage": 3}, "rounds_per_stage=3"),
        ({"coordinator_port": 4711}, "coordinator_port=4711"),
        ({"coordinator_host": "driver"}, "coordinator_host='driver'"),
        ({"worker_process": "spawn"}, "worker_process='spawn'"),
    ],
)
def test_what_has_no_meaning_without_a_port_is_refused_by_name(blobs, options, word):
    with pytest.raises(ConfigError, match=word):
        estimator(**options).fit(blobs)


def test_storage_that_cannot_be_written_is_refused_before_ingest(blobs, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(PreflightError, match="exchange_dir"):
        estimator(exchange_dir="/proc/nowhere").fit(blobs)


def test_large_parameters_go_through_the_storage(blobs, tmp_path):
    options = {"model": Wide, "model_args": {"megabytes": 6}, "optimizer": torch.optim.SGD, "learning_rate": 0.1}
    plain = estimator(**options, epochs=1).fit(blobs)
    stored = estimator(**options, epochs=1, exchange_dir=str(tmp_path / "exchange")).fit(blobs)
    assert same_bits(plain, stored)
    assert plain.history[-1].loss < plain.history[0].loss
    assert isinstance(plain.model, Wide)
    assert not isinstance(plain.model, Armed)
