"""MLflow itself: what a run holds, the model in another process, and servers that are down, hang or die."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from functools import partial
from pathlib import Path

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before MLflow is imported: it would report to its makers

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from tracked import Net, halved, side_by_side, two_inputs

from sparkdeep.errors import ConfigError
from sparkdeep.tracking import MLflowCallback, log_model
from sparkdeep.tracking.callbacks import FitInfo
from sparkdeep.tracking.records import RoundRecord

pytestmark = [
    pytest.mark.extras,
    pytest.mark.filterwarnings("default"),  # of MLflow and what it imports
]

HERE = Path(__file__).resolve().parent
INFO = FitInfo(
    run="abc",
    num_rounds=4,
    committed=0,
    rows=800,
    num_parameters=43,
    settings={"epochs": 2, "optimizer": ["torch.optim.sgd.SGD", [], {"lr": 0.1}], "long": "x" * 9000, "none": None},
)


def record(number, **changes):
    return RoundRecord(
        **{"round": number, "epoch": 1, "rows": 100, "loss": 1 / number, "seconds": 0.5, "compute_seconds": 0.25,
           "exchange_seconds": 0.125, "metrics": {"loss": 2 / number, "accuracy": 0.5} if number % 2 == 0 else {},
           **changes}
    )  # fmt: skip


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A sqlite store: its tables take seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def store(database, tmp_path):
    """The store, with an experiment of this test's own as the current one."""
    use(database)
    experiment = mlflow.create_experiment(str(tmp_path), artifact_location=(tmp_path / "artifacts").as_uri())
    mlflow.set_experiment(experiment_id=experiment)
    yield database
    while mlflow.active_run() is not None:
        mlflow.end_run()


def use(uri):
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)


def followed(callback, rounds=4, *, model=None, error=None, between=lambda number: None):
    """What a fit does with a callback; returns the seconds that the rounds and the end took."""
    callback.on_fit_start(INFO)
    began = time.monotonic()
    for number in range(1, rounds + 1):
        callback.on_round_end(record(number))
        between(number)
    ended = time.monotonic()
    callback.on_fit_end(model, error)
    return ended - began, time.monotonic() - ended


def history(run_id, name):
    return [(point.step, point.value) for point in mlflow.MlflowClient().get_metric_history(run_id, name)]


def own_warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "sparkdeep" and r.levelno >= logging.WARNING]


# -- what a run holds ---------------------------------------------------------------------------------------------------


def test_a_fit_has_a_run_with_its_settings_numbers_and_model(store, caplog):
    callback = MLflowCallback(run_name="mine")
    followed(callback, model=two_inputs())
    run = mlflow.get_run(callback.run_id)
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert mlflow.active_run() is None
    params = run.data.params
    assert params["epochs"] == "2"
    assert params["optimizer"] == '["torch.optim.sgd.SGD", [], {"lr": 0.1}]'
    assert params["none"] == "null"
    assert len(params["long"]) == 6000
    assert params["num_parameters"] == "43"
    assert run.data.tags["sparkdeep.rounds.run"] == "abc"
    assert history(callback.run_id, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert history(callback.run_id, "validation/accuracy") == [(2, 0.5), (4, 0.5)]
    assert history(callback.run_id, "rows_per_second") == [(n, 200.0) for n in range(1, 5)]
    assert history(callback.run_id, "seconds/exchange") == [(n, 0.125) for n in range(1, 5)]
    assert own_warnings(caplog) == []
    loaded = mlflow.pyfunc.load_model(f"runs:/{callback.run_id}/model")
    assert loaded.predict(rows()).prediction.tolist() == expected_classes()


def test_a_named_experiment_is_made_once(store, tmp_path):
    runs = []
    for _ in range(2):
        callback = MLflowCallback("digits", model_name=None)
        followed(callback)
        runs.append(mlflow.get_run(callback.run_id).info.experiment_id)
    assert runs[0] == runs[1] == mlflow.get_experiment_by_name("digits").experiment_id


def test_an_active_run_is_joined_and_left_open(store):
    callback = MLflowCallback(model_name=None)
    with mlflow.start_run() as active:
        followed(callback)
        assert callback.run_id == active.info.run_id
        assert mlflow.active_run().info.run_id == active.info.run_id
        assert mlflow.get_run(active.info.run_id).info.status == "RUNNING"
        mlflow.log_metric("after", 1.0)
    assert len(history(callback.run_id, "loss")) == 4
    assert len(mlflow.search_runs()) == 1


def test_a_search_has_a_child_run_a_fit(store):
    children = []
    with mlflow.start_run() as parent:
        for _ in range(2):
            callback = MLflowCallback(nested=True, model_name=None)
            followed(callback)
            children.append(callback.run_id)
        assert mlflow.active_run().info.run_id == parent.info.run_id
    for child in children:
        run = mlflow.get_run(child)
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
    assert len({parent.info.run_id, *children}) == 3


@pytest.mark.parametrize(("error", "status"), [(ValueError("bad rows"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_fit_that_ended_badly_says_so_in_its_run(store, error, status):
    callback = MLflowCallback()
    followed(callback, 2, error=error)
    run = mlflow.get_run(callback.run_id)
    assert run.info.status == status
    assert type(error).__name__ in run.data.tags["sparkdeep.error"]
    assert len(history(callback.run_id, "loss")) == 2


def test_a_loss_that_is_no_number_does_not_stop_the_rest(store, caplog):
    callback = MLflowCallback(model_name=None)
    callback.on_fit_start(INFO)
    callback.on_round_end(record(1, loss=math.nan))
    callback.on_round_end(record(2))
    callback.on_fit_end(None, None)
    assert [step for step, _ in history(callback.run_id, "loss")] == [1, 2]
    assert own_warnings(caplog) == []


def test_what_mlflow_refuses_is_named_and_the_rest_is_logged(store, caplog):
    with mlflow.start_run():
        mlflow.log_param("epochs", "77")
        callback = MLflowCallback(model_name=None)
        followed(callback)
    (warning,) = own_warnings(caplog)
    assert warning.startswith("MLflow refused the settings: ")
    assert "epochs" in warning
    assert len(history(callback.run_id, "loss")) == 4


# -- the model ----------------------------------------------------------------------------------------------------------


def rows():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {"pixels": list(rng.normal(size=(6, 3))), "area": rng.normal(size=6), "other": ["x"] * 6}, index=range(10, 16)
    )


def outputs(module=None, frame=None):
    frame = rows() if frame is None else frame
    area = torch.tensor(frame["area"].to_numpy(), dtype=torch.float32)
    pixels = torch.tensor(np.stack(list(frame["pixels"])), dtype=torch.float32)
    with torch.no_grad():
        return (module or Net(width=5))(area, pixels)


def expected_classes():
    return outputs().argmax(1).tolist()


def in_another_process(code, *, path=()):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *map(str, path)])},
        capture_output=True, text=True, timeout=120, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def test_a_model_is_scored_in_a_fresh_process_without_a_jvm(store, tmp_path):
    with mlflow.start_run():
        info = log_model(two_inputs())
    rows().to_json(tmp_path / "rows.json")
    code = f"""
        import sys
        import mlflow, pandas as pd
        mlflow.set_tracking_uri({store!r})
        model = mlflow.pyfunc.load_model({info.model_uri!r})
        predictions = model.predict(pd.read_json({str(tmp_path / "rows.json")!r}))
        from pyspark import SparkContext
        assert SparkContext._active_spark_context is None and SparkContext._gateway is None
        print(predictions.prediction.tolist())
    """
    assert in_another_process(code, path=[HERE]) == str(expected_classes())


def test_code_paths_bring_the_networks_source_along(store, tmp_path):
    with mlflow.start_run():
        info = log_model(two_inputs(preprocess=halved), code_paths=[str(HERE / "tracked.py")])
    rows().to_json(tmp_path / "rows.json")
    code = f"""
        import mlflow, pandas as pd
        mlflow.set_tracking_uri({store!r})
        print(mlflow.pyfunc.load_model({info.model_uri!r}).predict(pd.read_json({str(tmp_path / "rows.json")!r}))
            .prediction.tolist())
    """
    frame = rows()
    frame["area"] /= 2
    frame["pixels"] = [pixels / 2 for pixels in frame["pixels"]]
    assert in_another_process(code) == str(outputs(frame=frame).argmax(1).tolist())


def test_the_signature_names_columns_and_types_and_is_enforced(store):
    with mlflow.start_run():
        info = log_model(two_inputs())
    loaded = mlflow.pyfunc.load_model(info.model_uri)
    assert loaded.metadata.flavors["python_function"]["loader_module"] == "sparkdeep.pyfunc"
    assert {spec.name: str(spec.type) for spec in loaded.metadata.signature.inputs} == {
        "area": "DataType.double", "pixels": "Array(double)"}  # fmt: skip
    assert [(spec.name, str(spec.type)) for spec in loaded.metadata.signature.outputs] == [
        ("prediction", "DataType.long")
    ]
    scored = loaded.predict(rows())
    assert scored.index.tolist() == list(range(10, 16))
    assert scored.columns.tolist() == ["prediction"]
    with pytest.raises(mlflow.exceptions.MlflowException, match="area"):
        loaded.predict(rows().drop(columns="area"))


def test_the_output_itself_and_the_vectors_of_a_classifier_are_columns(store):
    with mlflow.start_run():
        plain = mlflow.pyfunc.load_model(log_model(two_inputs(prediction=None)).model_uri).predict(rows())
        whole = two_inputs(probability_col="probability", prediction_col="class")
        loaded = mlflow.pyfunc.load_model(log_model(whole, "whole").model_uri)
    np.testing.assert_allclose(np.stack(list(plain["prediction"])), outputs().numpy(), rtol=1e-6)
    scored = loaded.predict(rows())
    assert scored["class"].tolist() == expected_classes()
    np.testing.assert_allclose(np.stack(list(scored["probability"])), outputs().softmax(1).numpy(), rtol=1e-6)
    assert [spec.name for spec in loaded.metadata.signature.outputs] == ["class", "probability"]


def test_numbers_laid_side_by_side_are_a_column_each(store):
    frame = pd.DataFrame({"age": [1.0, 2.0], "area": [3.0, 4.0]})
    model = side_by_side()
    with mlflow.start_run():
        loaded = mlflow.pyfunc.load_model(log_model(model).model_uri)
    with torch.no_grad():
        expected = model.model(torch.tensor([[3.0, 1.0], [4.0, 2.0]])).flatten().tolist()
    assert loaded.predict(frame)["prediction"].tolist() == pytest.approx(expected)
    assert {spec.name: str(spec.type) for spec in loaded.metadata.signature.inputs} == {
        "area": "DataType.double", "age": "DataType.double"}  # fmt: skip


def test_scoring_leaves_the_number_of_threads_alone(store):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with mlflow.start_run():
            log_model(two_inputs())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_network_that_no_other_process_could_find_is_refused_unless_pickled(store, tmp_path):
    class Local(nn.Module):
        def forward(self, area, pixels):
            return pixels * 2

    model = two_inputs(reference=None, prediction=None)
    model.model = Local()
    with mlflow.start_run():
        with pytest.raises(ConfigError, match=r"Local'.*code_paths.*pickle=True"):
            log_model(model)
        with pytest.raises(ConfigError, match=r"prediction \(.*lambda.*cannot be stored"):
            log_model(two_inputs(prediction=lambda output: output))
        info = log_model(model, pickle=True)
    rows().to_json(tmp_path / "rows.json")
    code = f"""
        import mlflow, pandas as pd
        mlflow.set_tracking_uri({store!r})
        scored = mlflow.pyfunc.load_model({info.model_uri!r}).predict(pd.read_json({str(tmp_path / "rows.json")!r}))
        print(round(float(scored.prediction.iloc[0][0]), 4))
    """
    assert in_another_process(code) == str(round(2 * rows()["pixels"].iloc[0][0], 4))


def test_a_model_that_cannot_be_logged_costs_a_warning_and_the_run_ends_well(store, caplog):
    callback = MLflowCallback()
    followed(callback, model=two_inputs(reference=None))
    (warning,) = own_warnings(caplog)
    assert warning.startswith("MLflow refused the model: ")
    assert "pickle=True" in warning
    assert mlflow.get_run(callback.run_id).info.status == "FINISHED"


# -- servers ------------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """An MLflow server of its own on loopback."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, free_port(), None
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
                   "--backend-store-uri", f"sqlite:///{self.folder}/server.db",
                   "--artifacts-destination", f"{self.folder}/artifacts"]  # fmt: skip
        self.log = open(self.folder / "server.log", "ab")  # noqa: SIM115 (closed by kill)
        self.process = subprocess.Popen(
            [sys.executable, *command], stdout=self.log, stderr=self.log, cwd=self.folder, start_new_session=True
        )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return self
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
                time.sleep(0.1)
        raise AssertionError("the server did not come up")

    def kill(self):
        if self.process is not None and self.process.pid > 1:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=10)
            self.process = None
            self.log.close()


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path)
    use(made.uri)
    yield made
    made.kill()


def test_a_server_that_is_down_or_dies_in_mid_run_misses_nothing_once_it_is_back(server, caplog):
    before = MLflowCallback("later", timeout_s=6.0)
    rounds_s, end_s = followed(before, model=two_inputs())  # nothing listens yet
    assert rounds_s < 4.0
    assert end_s < 60.0
    first, second = own_warnings(caplog)
    assert "MLflow cannot be reached" in first
    assert "8 item(s) of this run were not taken and are kept; call flush()" in second
    server.start()
    mlflow.search_experiments()  # its first answer takes long
    wait_for(lambda: before.flush() == 0)
    assert [step for step, _ in history(before.run_id, "loss")] == [1, 2, 3, 4]
    assert mlflow.get_run(before.run_id).info.status == "FINISHED"
    assert len(mlflow.pyfunc.load_model(f"runs:/{before.run_id}/model").predict(rows())) == 6
    assert mlflow.search_runs(experiment_names=["later"]).run_id.tolist() == [before.run_id]

    caplog.clear()
    callback = MLflowCallback("restarted", model_name=None, timeout_s=30.0)

    def disturb(number):
        if number == 2:
            wait_for(lambda: callback.run_id and len(history(callback.run_id, "loss")) == 2)
            server.kill()
        if number == 6:
            wait_for(lambda: own_warnings(caplog))
            server.start()

    followed(callback, 8, between=disturb)
    (warning,) = own_warnings(caplog)
    assert "MLflow cannot be reached" in warning
    assert [step for step, _ in history(callback.run_id, "loss")] == list(range(1, 9))
    assert mlflow.get_run(callback.run_id).info.status == "FINISHED"


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_that_never_answers_is_not_waited_for(tmp_path, caplog):
    accepted = []
    listener = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            try:
                accepted.append(listener.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    use(f"http://127.0.0.1:{listener.getsockname()[1]}")
    callback = MLflowCallback(timeout_s=5.0)
    try:
        rounds_s, end_s = followed(callback)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in accepted:
            connection.close()
        thread.join(timeout=5)
    assert accepted
    assert rounds_s < 4.0
    assert end_s < 60.0
    assert len(own_warnings(caplog)) == 2
    # The request under way ends by itself, and MLflow's own settings are as they were.
    wait_for(lambda: not {"MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"} & os.environ.keys(), 60)


# -- a real fit ---------------------------------------------------------------------------------------------------------


def test_a_fit_on_spark_is_logged_whole(spark, store, caplog):
    frame = spark.range(200).selectExpr(
        "double(id % 7) / 7 AS area", "array(double(id % 3), double(id % 5), 1D) AS pixels", "id % 3 AS label"
    )
    from sparkdeep import TorchEstimator

    callback = MLflowCallback()
    model = TorchEstimator(
        model=Net,
        model_args={"width": 6},
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        feature_cols={"area": "area", "pixels": "pixels"},
        label_cols="label",
        validation=0.2,
        epochs=3,
        sync_every=2,
        prediction="argmax",
        progress=False,
        callbacks=[callback],
    ).fit(frame)
    run = mlflow.get_run(callback.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["num_workers"] == "2"
    assert run.data.params["model"].endswith("Net")
    assert history(callback.run_id, "loss") == [(r.round, r.loss) for r in model.history]
    scored = [(r.round, r.metrics["loss"]) for r in model.history if r.metrics]
    assert history(callback.run_id, "validation/loss") == scored
    ours = model.transform(frame).select("prediction").toPandas()
    theirs = mlflow.pyfunc.load_model(f"runs:/{callback.run_id}/model").predict(frame.drop("label").toPandas())
    assert theirs["prediction"].tolist() == ours["prediction"].tolist()
    assert own_warnings(caplog) == []
