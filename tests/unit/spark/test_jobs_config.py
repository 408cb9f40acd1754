from __future__ import annotations

import json
import signal
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from sparkdeep import QSR, Median, WarmStart
from sparkdeep.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelLoadError,
    PreflightError,
    ReplicaLostError,
    UserCodeError,
)
from sparkdeep.spark.job import run as job_module
from sparkdeep.spark.job.config import load_config, parse_config, with_overrides
from sparkdeep.spark.job.metrics import batch_accuracy, batch_mae, validation_metrics
from sparkdeep.spark.job.result import exit_code_of, result_of, write_records, write_result
from sparkdeep.spark.job.run import Job, run_job
from sparkdeep.tracking.callbacks import Callback

DIGITS = ROOT / "conf" / "digits.toml"

MINIMAL = """
metrics = ["accuracy"]
[data]
source = "parquet"
path = "rows"
[model]
factory = "torch.nn:Linear"
args = { in_features = 2, out_features = 2 }
[loss]
name = "torch.nn:CrossEntropyLoss"
args = { label_smoothing = 0.1 }
[optimizer]
name = "torch.optim:SGD"
args = { lr = 0.1 }
[fit]
feature_cols = ["x"]
label_cols = "label"
"""


def document(**changes):
    return {**tomllib.loads(MINIMAL), **changes}


def parsed(**changes):
    return parse_config(document(**changes), Path("conf/small.toml"))


@pytest.fixture
def minimal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    previous = signal.getsignal(signal.SIGTERM)
    path = tmp_path / "small.toml"
    path.write_text(MINIMAL)
    yield path
    signal.signal(signal.SIGTERM, previous)


def result(tmp_path, name="result.json"):
    return json.loads((tmp_path / "runs" / "small" / name).read_text())


# Sections


def test_the_digits_configuration_is_read_as_written():
    config = load_config(DIGITS)
    assert config.model.name == "digits:Net"
    assert config.data.test == 0.2
    assert config.fit["num_workers"] == 2
    assert config.metrics == ("accuracy",)
    assert config.output.dir == "runs/digits"
    assert config.spark.master == "local[2]"
    assert config.spark.conf == {"spark.ui.enabled": "false", "spark.sql.shuffle.partitions": "4"}


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*.toml")), ids=lambda path: path.name)
def test_every_configuration_in_the_repository_is_valid(path):
    assert load_config(path).path == path


def test_what_is_left_out_has_defaults():
    config = parsed()
    assert (config.data.test, config.data.seed, config.data.columns) == (0.2, 0, ())
    assert config.output.dir == "runs/small"
    assert config.lr_scheduler is None
    assert config.spark.conf == {}


def test_spark_properties_may_be_quoted_or_nested():
    text = '[spark]\nmaster = "yarn"\n"spark.a.b" = 4\n[spark.spark.c]\nd = true'
    config = parse_config({**document(), **tomllib.loads(text)}, Path("x.toml"))
    assert config.spark.master == "yarn"
    assert config.spark.conf == {"spark.a.b": "4", "spark.c.d": "true"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dato": {}}, "unknown section 'dato'. Did you mean 'data'?"),
        ({"data": {"sorce": "csv"}}, "unknown key of [data] 'sorce'. Did you mean 'source'?"),
        ({"model": {"factory": "a:b", "argz": {}}}, "unknown key of [model] 'argz'. Did you mean 'args'?"),
        ({"optimizer": {"nam": "a:b"}}, "unknown key of [optimizer] 'nam'. Did you mean 'name'?"),
        ({"output": {"folder": "x"}}, "unknown key of [output] 'folder'"),
        ({"metrics": ["acuracy"]}, "unknown metric 'acuracy'. Did you mean 'accuracy'?"),
        ({"spark": {"mastr": "local[2]"}}, "[spark] has the unknown key 'mastr'"),
        ({"data": {}}, "[data] has no source"),
        ({"data": {"source": 3}}, "[data] source = 3 must be a string"),
        ({"data": {"source": "csv", "seed": True}}, "[data] seed = True must be an integer"),
        ({"data": {"source": "csv", "test": 1.5}}, "[data] test = 1.5 must be a fraction between 0 and 1"),
        ({"data": {"source": "csv", "test": 0}}, "[data] test = 0 must be a fraction"),
        ({"data": {"source": "csv", "columns": ["a", 1]}}, "[data] columns = ['a', 1] must be an array of strings"),
        ({"data": "csv"}, "data = 'csv' must be a table: write [data]"),
        ({"model": {"args": {}}}, '[model] has no factory: give factory = "package.module:factory"'),
        ({"model": {"factory": "torch.nn.Linear"}}, "[model] names 'torch.nn.Linear': write \"package.module:name\""),
        ({"loss": {}}, "[loss] names ''"),
        ({"metrics": "accuracy"}, "metrics = 'accuracy' must be an array of strings"),
    ],
)
def test_a_wrong_document_is_refused_with_value_and_remedy(changes, message):
    with pytest.raises(ConfigError) as raised:
        parsed(**changes)
    assert message in str(raised.value)


@pytest.mark.parametrize("section", ["data", "model", "optimizer"])
def test_a_missing_section_is_named(section):
    given_document = document()
    del given_document[section]
    with pytest.raises(ConfigError, match=rf"has no \[{section}\]: a job needs \[data\], \[model\]"):
        parse_config(given_document, Path("x.toml"))


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml' cannot be read .*No such file"):
        load_config(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("a = \n")
    with pytest.raises(ConfigError, match=r"bad\.toml' is not TOML: .*line 1"):
        load_config(tmp_path / "bad.toml")


# --set


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("fit.epochs=3", ("fit", "epochs"), 3),
        ("fit.epochs = 3", ("fit", "epochs"), 3),
        ("optimizer.args.lr=1e-2", ("optimizer", "args", "lr"), 0.01),
        ("fit.progress=false", ("fit", "progress"), False),
        ('fit.feature_cols=["a", "b"]', ("fit", "feature_cols"), ["a", "b"]),
        ("model.args={hidden = 8}", ("model", "args"), {"hidden": 8}),
        ("spark.master=local[4]", ("spark", "master"), "local[4]"),
        ("data.path=/a b/c=d", ("data", "path"), "/a b/c=d"),
        ('data.path="3"', ("data", "path"), "3"),
        ('spark."spark.ui.enabled"=true', ("spark", "spark.ui.enabled"), True),
        ("new.table.key=1", ("new", "table", "key"), 1),
    ],
)
def test_an_override_sets_a_typed_value(text, path, value):
    node = with_overrides(document(), [text])
    for key in path:
        node = node[key]
    assert node == value
    assert type(node) is type(value)


def test_an_override_keeps_its_neighbors_and_the_document():
    original = document()
    changed = with_overrides(original, ["fit.epochs=3", "fit.epochs=4"])
    assert changed["fit"] == {"feature_cols": ["x"], "label_cols": "label", "epochs": 4}
    assert original == document()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fit.epochs", "--set 'fit.epochs': --set takes dotted.key=value"),
        ("=3", "has no TOML key before '='"),
        ("fit..epochs=3", "has no TOML key before '='"),
        ("fit.a=[1, 2", "the value is not TOML"),
        ("fit.a='open", "the value is not TOML"),
        ("metrics.x=1", "'metrics' holds ['accuracy'], which has no keys: set 'metrics' itself"),
        ("fit.a=1\nb=2", "--set takes dotted.key=value"),
    ],
)
def test_a_wrong_override_is_refused(text, message):
    with pytest.raises(ConfigError) as raised:
        with_overrides(document(), [text])
    assert message in str(raised.value)


def test_an_override_with_an_unknown_key_meets_the_suggestion(minimal):
    with pytest.raises(ConfigError, match=r"'seeed'\. Did you mean 'seed'"):
        load_config(minimal, ["data.seeed=3"])


@given(st.integers(-(2**62), 2**62) | st.booleans() | st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_survives_an_override(value):
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    assert with_overrides({}, [f"a.b={text}"]) == {"a": {"b": value}}


# Metrics


def test_batch_metrics_match_their_definitions():
    output = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    assert batch_accuracy(output, torch.tensor([0, 1, 1])).item() == pytest.approx(2 / 3)
    # A column of predictions must not be broadcast against a row of labels.
    assert batch_mae(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 4.0])).item() == 1.5
    assert set(validation_metrics(["accuracy", "rmse", "mae"])) == {"accuracy", "mae"}


# The estimator's arguments


def test_a_model_is_loaded_with_the_configurations_module_and_callables(monkeypatch):
    seen = {}
    monkeypatch.setattr("sparkdeep.TorchModel.load", lambda path, **given: seen.update(given, path=path))
    monkeypatch.setattr(Job, "session", lambda self: None)
    fit = {"preprocess": "torch:relu", "prediction": "argmax", "epochs": 2}
    Job(config=parsed(fit=fit, output={"dir": "s3://bucket/run/"})).load_model()
    assert seen == {
        "path": "s3://bucket/run/model",
        "allow_modules": ["torch.nn"],
        "preprocess": torch.relu,
        "prediction": "argmax",
    }


FIT = {"feature_cols": ["x"], "label_cols": "label", "epochs": 3, "validation": 0.1, "progress": False}


def estimator(**changes):
    return Job(config=parsed(**{"fit": FIT, **changes})).estimator()


def test_sections_become_the_estimators_arguments():
    made = estimator(
        lr_scheduler={"name": "torch.optim.lr_scheduler:StepLR", "args": {"step_size": 3}},
        fit={**FIT, "early_stopping": {"patience": 5}},
    )
    assert made.settings().model == "torch.nn:Linear"
    assert made.settings().model_args == {"in_features": 2, "out_features": 2}
    assert isinstance(made.settings().loss, torch.nn.CrossEntropyLoss)
    assert made.settings().loss.label_smoothing == 0.1
    optimizer = made.settings().optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.1
    assert made.settings().lr_scheduler(optimizer).step_size == 3
    assert made.settings().outer_optimizer is None
    assert made.settings().run.early_stopping.patience == 5
    assert made.settings().run.epochs == 3
    assert list(made.settings().metrics) == ["accuracy"]


def test_algorithms_rules_and_values_go_by_name():
    made = estimator(
        fit={
            **FIT,
            "algorithm": {"name": "diloco", "lr": 0.6},
            "schedule": {"name": "WarmStart", "num_steps": 5, "then": {"name": "QSR", "alpha": 0.3}},
            "aggregator": "Median",
        }
    ).settings()
    assert made.outer_optimizer.keywords["lr"] == 0.6
    assert made.run.sync_every == 500
    assert made.run.schedule == WarmStart(5, then=QSR(0.3))
    assert made.run.aggregator == Median()
    assert estimator(fit={**FIT, "algorithm": "slowmo", "aggregator": "mean"}).settings().run.sync_every == 48


def test_the_digits_configuration_makes_an_estimator(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    made = Job(config=load_config(DIGITS)).estimator()
    assert (made.getNumWorkers(), made.getSyncEvery(), made.getPrediction()) == (2, 10, "argmax")


def test_metrics_without_validation_rows_are_left_to_the_test_rows():
    fit = {key: value for key, value in FIT.items() if key != "validation"}
    assert estimator(fit=fit).getMetrics() == {}


def test_a_training_step_stands_for_the_loss():
    given_document = document(fit={**FIT, "training_step": "torch.nn.functional:mse_loss"})
    del given_document["loss"]
    made = Job(config=parse_config(given_document, Path("x.toml"))).estimator()
    assert made.settings().loss is None
    assert made.settings().training_step is torch.nn.functional.mse_loss


def test_a_function_may_be_the_loss():
    made = estimator(loss={"name": "torch.nn.functional:cross_entropy", "args": {"label_smoothing": 0.2}})
    assert made.settings().loss.func is torch.nn.functional.cross_entropy
    assert made.settings().loss.keywords == {"label_smoothing": 0.2}


def test_round_records_are_collected_and_user_callbacks_kept():
    job = Job(config=parsed(fit={**FIT, "callbacks": ["builtins:print"]}))
    made = job.estimator()
    made.getCallbacks()[0].on_round_end("record")
    assert job.records == ["record"]
    assert made.getCallbacks()[1:] == [print]


def test_a_callbacks_class_stands_for_an_object_of_it():
    job = Job(config=parsed(fit={**FIT, "callbacks": ["sparkdeep.tracking.callbacks:Callback"]}))
    (_, made) = job.estimator().getCallbacks()
    assert type(made) is Callback


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fit": {**FIT, "epoch": 3}}, "'epoch'. Did you mean 'epochs'?"),
        ({"fit": {**FIT, "epochs": 0}}, "epochs=0"),
        ({"fit": {**FIT, "loss": "x"}}, "[fit] holds 'loss': it has its own place, [loss]"),
        ({"fit": {**FIT, "metrics": []}}, "[fit] holds 'metrics': it has its own place, metrics = [...] at the top"),
        ({"fit": {"label_cols": "y"}}, '[fit] has no feature_cols: give feature_cols = ["column", ...]'),
        ({"fit": {**FIT, "early_stopping": {"patients": 3}}}, "'patients'. Did you mean 'patience'?"),
        ({"fit": {**FIT, "schedule": {"name": "QRS"}}}, "unknown schedule 'QRS'. Did you mean 'QSR'?"),
        (
            {"fit": {**FIT, "schedule": {"name": "QSR", "alfa": 1}}},
            "unknown argument of QSR 'alfa'. Did you mean 'alpha'?",
        ),
        ({"fit": {**FIT, "schedule": {"name": "QSR"}}}, "missing 1 required positional argument: 'alpha'"),
        ({"fit": {**FIT, "algorithm": {"name": "dilocco"}}}, "unknown algorithm 'dilocco'. Did you mean 'diloco'?"),
        (
            {"fit": {**FIT, "algorithm": {"name": "diloco", "rate": 1}}},
            "unknown argument of diloco 'rate'. Known: lr, momentum, sync_every.",
        ),
        ({"fit": {**FIT, "drift_correction": {"mu": 0.1}}}, "must have a name"),
        (
            {"optimizer": {"name": "torch.optim:SGD", "args": {"momentun": 0.9}}},
            "unknown argument of 'torch.optim:SGD' 'momentun'. Did you mean 'momentum'?",
        ),
        (
            {"model": {"factory": "torch.nn:Linear", "args": {"in_feature": 2}}},
            "unknown argument of 'torch.nn:Linear' 'in_feature'. Did you mean 'in_features'?",
        ),
        (
            {"loss": {"name": "torch.nn:TripletMarginLoss", "args": {"margin": -1.0}}},
            "[loss] torch.nn:TripletMarginLoss({'margin': -1.0}) cannot be made",
        ),
        ({"loss": {"name": "torch.nn:CrossEntropyLos"}}, "did you mean 'CrossEntropyLoss'?"),
        ({"model": {"factory": "absent_module:Net"}}, "module 'absent_module' cannot be imported"),
    ],
)
def test_wrong_estimator_arguments_are_refused_before_a_session(changes, message):
    with pytest.raises(ConfigError) as raised:
        estimator(**changes)
    assert message in str(raised.value)


@pytest.mark.parametrize(("given_labels", "label"), [("y", "y"), (["y"], "y")])
def test_the_scored_label_is_one_column(given_labels, label):
    assert Job(config=parsed(fit={"label_cols": given_labels})).label() == label


@pytest.mark.parametrize("labels", [None, ["a", "b"], {"a": "b"}])
def test_several_labels_are_not_scored(labels):
    fit = {} if labels is None else {"label_cols": labels}
    with pytest.raises(ConfigError, match="a job scores one label column"):
        Job(config=parsed(fit=fit)).label()


# Exit codes and the result file


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (ConfigError("x"), 2),
        (DataError("x"), 2),
        (PreflightError("x"), 2),
        (CheckpointError("x"), 1),
        (ModelLoadError("x"), 1),
        (ReplicaLostError("x"), 1),
        (UserCodeError("x"), 1),
        (ValueError("x"), 1),
        (KeyboardInterrupt(), 1),
        (SystemExit(0), 1),
    ],
)
def test_exit_codes(error, code):
    assert exit_code_of(error) == code
    status = {0: "done", 1: "failed", 2: "wrong configuration"}[code]
    assert result_of(error, rounds=0, resumable=False, seconds=1.0)["status"] == status


def run(path, work, *arguments):
    return run_job(work, description="test", result_name="result.json", argv=[str(path), *arguments])


def test_a_done_job_says_so(minimal, tmp_path, capsys):
    def work(job):
        job.result["accuracy"] = 0.5

    assert run(minimal, work) == 0
    written = result(tmp_path)
    assert (written["status"], written["exit_code"], written["error"]) == ("done", 0, None)
    assert (written["accuracy"], written["resumable"], written["rounds"]) == (0.5, False, 0)
    assert written["seconds"] >= 0
    assert {"python", "torch", "pyspark", "sparkdeep"} <= set(written["versions"])
    assert capsys.readouterr().err == ""


def test_a_failed_job_has_its_error_traceback_and_rounds(minimal, tmp_path, capsys):
    class Record:
        def to_dict(self):
            return {"round": 1, "loss": float("nan")}

    def work(job):
        job.records.append(Record())
        raise RuntimeError("no luck")

    assert run(minimal, work) == 1
    assert result(tmp_path)["error"] == {"type": "RuntimeError", "message": "no luck"}
    assert result(tmp_path)["rounds"] == 1
    assert (tmp_path / "runs/small/rounds.jsonl").read_text() == '{"round": 1, "loss": null}\n'
    assert "Traceback" in (errors := capsys.readouterr().err)
    assert "failed: no luck" in errors


def test_a_wrong_configuration_gives_one_line_and_exit_code_2(minimal, tmp_path, capsys):
    assert run(minimal, lambda job: None, "--set", "data.sed=1") == 2
    assert result(tmp_path)["status"] == "wrong configuration"
    assert result(tmp_path)["error"]["type"] == "ConfigError"
    errors = capsys.readouterr().err
    assert errors.startswith("wrong configuration: unknown key of [data] 'sed'")
    assert errors.count("\n") == 1


def test_the_result_goes_where_the_override_says(minimal, tmp_path):
    assert run(minimal, lambda job: None, "--set", "output.dir=elsewhere/deep") == 0
    assert json.loads((tmp_path / "elsewhere/deep/result.json").read_text())["status"] == "done"


def test_an_unreadable_configuration_is_exit_code_2(tmp_path, capsys):
    assert run(tmp_path / "absent.toml", lambda job: None) == 2
    assert "wrong configuration" in capsys.readouterr().err


def test_a_terminated_job_still_writes_its_result(minimal, tmp_path):
    def work(job):
        signal.raise_signal(signal.SIGTERM)

    assert run(minimal, work) == 1
    assert result(tmp_path)["error"] == {"type": "KeyboardInterrupt", "message": "stopped by SIGTERM"}


def test_an_earlier_result_is_gone_while_a_job_runs(minimal, tmp_path):
    assert run(minimal, lambda job: None) == 0
    seen = []
    assert run(minimal, lambda job: seen.append((tmp_path / "runs/small/result.json").exists())) == 0
    assert seen == [False]


@pytest.mark.parametrize(
    ("files", "resumable"), [([], False), (["rounds/000001.ab/x"], False), (["commits/000001.json"], True)]
)
def test_resumable_means_a_committed_round(minimal, tmp_path, files, resumable):
    for name in files:
        (tmp_path / "kept" / name).parent.mkdir(parents=True)
        (tmp_path / "kept" / name).write_text("{}")
    run(minimal, lambda job: None, "--set", "fit.checkpoint_dir=kept")
    assert result(tmp_path)["resumable"] is resumable


def test_the_configurations_folder_is_searched_for_modules(minimal, tmp_path):
    (tmp_path / "users_own_net.py").write_text("import torch\nNet = torch.nn.Identity\n")
    seen = []
    work = lambda job: seen.append(job_module.import_factory("users_own_net:Net"))  # noqa: E731
    assert run(minimal, work) == 0
    assert seen == [torch.nn.Identity]


def test_files_are_strict_json(tmp_path):
    write_result(str(tmp_path), "r.json", {"a": [float("inf"), 1.0], "b": {"c": float("nan")}})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": [None, 1.0], "b": {"c": None}}
    write_records(str(tmp_path), [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "rounds.jsonl"]
