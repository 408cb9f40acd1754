"""Rows of the fault matrix with replicas that are processes: real signals on the real wire, without Spark."""

from __future__ import annotations

import contextlib
import signal
import time

import psutil
import pytest
from invariants import (
    OPTIONS,
    SIZES,
    Outcome,
    X,
    Y,
    assert_invariants,
    assert_nothing_is_left,
    program,
    tensors_of,
    train,
)
from twin import deal, schema_of, write_shards
from twin_faults import Plan

from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.testing.injection import Injector

plain_replicas = pytest.importorskip("speed_parts.plain_replicas")


@contextlib.contextmanager
def nothing_outlives():
    """Replicas and their helpers are gone when a fit is over; the server that they are forked from stays."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    servers = {process.pid for process in psutil.Process().children()}
    deadline = time.monotonic() + 10.0
    while left := {process.pid for process in psutil.Process().children(recursive=True)} - before - servers:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def train_in_processes(folder, injector=None, **options):
    own = program(preprocess=injector.carrier()) if injector is not None else program()
    settings = {**OPTIONS, **options}
    batch_size = settings.pop("batch_size")
    shards = write_shards(folder, deal(X, Y, SIZES), schema_of(X, Y))
    began = time.monotonic()
    with (
        nothing_outlives(),
        plain_replicas.plain_fit(own, LocalSettings(batch_size=batch_size), RunSettings(**settings), shards) as fit,
    ):
        records = list(fit.rounds())
        fit.load_result()
    if injector is not None:
        injector.check_fired()
    assert_nothing_is_left(fit.stages.coordinator.address)
    return Outcome(
        tensors_of(fit.program.model), records, fit.stages.coordinator.address, time.monotonic() - began, Plan()
    )


def test_processes_train_to_the_bits_of_threads(tmp_path, undisturbed):
    assert_invariants(train_in_processes(tmp_path), undisturbed)


@pytest.mark.fault(rows=[3], phases="LD,TR,RT")
@pytest.mark.parametrize(("phase", "round_number"), [("load", None), ("train", 3), ("step", 4), ("transfer", 5)])
def test_a_killed_process_costs_a_repetition_and_not_a_bit(tmp_path, undisturbed, phase, round_number):
    injector = Injector(tmp_path / "plan").kill_at(phase, round_number, 1)
    got = train_in_processes(tmp_path, injector)
    assert_invariants(got, undisturbed)
    assert sum(record.retries for record in got.records) == 1


@pytest.mark.fault(rows=[4], phases="TR")
def test_a_process_that_crashes_in_native_code_costs_a_repetition_and_not_a_bit(tmp_path, undisturbed):
    injector = Injector(tmp_path / "plan").kill_at("step", 2, 0, signum=signal.SIGSEGV)
    assert_invariants(train_in_processes(tmp_path, injector), undisturbed)


@pytest.mark.fault(rows=[10], phases="TR,RT")
@pytest.mark.parametrize("phase", ["train", "transfer"])
def test_a_stopped_process_is_given_up_at_the_deadline_and_removed(tmp_path, undisturbed, phase):
    injector = Injector(tmp_path / "plan").kill_at(phase, 3, 0, signum=signal.SIGSTOP)
    got = train_in_processes(tmp_path, injector, stall_timeout_s=1.0)
    assert_invariants(got, undisturbed)
    assert got.records[2].retries >= 1
    assert got.seconds < 100.0


@pytest.mark.fault(rows=[11], phases="TR")
def test_a_slow_process_is_waited_for_and_named_by_its_seconds(tmp_path, undisturbed):
    injector = Injector(tmp_path / "plan").delay_at("step", 3, 1, seconds=3.0)
    got = train_in_processes(tmp_path, injector)
    assert_invariants(got, undisturbed)
    assert sum(record.retries for record in got.records) == 0
    fast, slow = (part.compute_seconds for part in got.records[2].replicas)
    assert slow >= 3.0
    assert slow > fast


def test_the_comparison_with_threads_can_fail(tmp_path):
    slower = train(tmp_path, epochs=1)
    with pytest.raises(AssertionError):
        assert_invariants(train_in_processes(tmp_path), slower)
