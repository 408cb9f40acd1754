"""Event files as TensorBoard's own reader finds them."""

from __future__ import annotations

import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparkdeep.tracking import TensorBoardCallback
from sparkdeep.tracking.callbacks import FitInfo
from sparkdeep.tracking.records import ReplicaRecord, RoundRecord

pytestmark = [
    pytest.mark.extras,
    pytest.mark.filterwarnings("default"),  # of TensorBoard and what it imports
]


def info(committed=0):
    return FitInfo(
        run="abc", num_rounds=4, committed=committed, rows=800, num_parameters=43, settings={"epochs": 2, "a|b": "c\nd"}
    )


def record(number, **changes):
    parts = [
        ReplicaRecord(replica=i, host="h", rows=50, weight=50.0, steps=2, compute_seconds=t, input_seconds=0.1)
        for i, t in enumerate((0.25, 0.0))
    ]
    return RoundRecord(
        **{"round": number, "epoch": 1, "rows": 100, "loss": 1 / number, "seconds": 0.5, "compute_seconds": 0.25,
           "metrics": {"accuracy": 0.5} if number % 2 == 0 else {}, "replicas": parts, **changes}
    )  # fmt: skip


def followed(callback, rounds, *, committed=0, error=None):
    callback.on_fit_start(info(committed))
    for one in rounds:
        callback.on_round_end(one)
    callback.on_fit_end(None, error)


def read(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def points(events, name):
    return [(point.step, pytest.approx(point.value)) for point in events.Scalars(name)]


def test_every_round_is_a_point_of_each_scalar(tmp_path):
    followed(TensorBoardCallback(tmp_path / "run"), [record(n) for n in range(1, 5)])
    events = read(tmp_path / "run")
    assert points(events, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert points(events, "validation/accuracy") == [(2, 0.5), (4, 0.5)]
    assert points(events, "rows_per_second") == [(n, 200.0) for n in range(1, 5)]
    assert points(events, "seconds/compute") == [(n, 0.25) for n in range(1, 5)]
    assert points(events, "replica_rows_per_second/0") == [(n, 200.0) for n in range(1, 5)]
    assert "replica_rows_per_second/1" not in events.Tags()["scalars"]  # it took no measurable time
    (settings,) = events.Tensors("settings/text_summary")
    text = settings.tensor_proto.string_val[0].decode()
    assert "| epochs | 2 |" in text
    assert "| a\\|b | c d |" in text


def test_a_round_can_be_seen_before_the_fit_is_over(tmp_path):
    callback = TensorBoardCallback(str(tmp_path))
    callback.on_fit_start(info())
    callback.on_round_end(record(1))
    assert points(read(tmp_path), "loss") == [(1, 1.0)]
    callback.on_fit_end(None, None)


def test_a_loss_that_is_no_number_is_shown_as_such(tmp_path):
    followed(TensorBoardCallback(tmp_path), [record(1, loss=math.nan)])
    ((step, value),) = [(point.step, point.value) for point in read(tmp_path).Scalars("loss")]
    assert step == 1
    assert math.isnan(value)


def test_a_resumed_fit_hides_what_an_earlier_one_wrote_for_the_rounds_it_runs_again(tmp_path):
    followed(TensorBoardCallback(tmp_path), [record(n, loss=9.0) for n in range(1, 5)], error=ValueError("killed"))
    assert "error/text_summary" in read(tmp_path).Tags()["tensors"]
    followed(TensorBoardCallback(tmp_path), [record(n) for n in (3, 4)], committed=2)
    assert points(read(tmp_path), "loss") == [(1, 9.0), (2, 9.0), (3, 1 / 3), (4, 0.25)]


def test_an_end_without_a_start_is_nothing(tmp_path):
    TensorBoardCallback(tmp_path / "none").on_fit_end(None, ValueError())
    assert not (tmp_path / "none").exists()
