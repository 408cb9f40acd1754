"""`TorchModel` without a JVM: its params, and its files under Spark ML's writer and reader."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from model_parts import Net, schema
from pyspark.ml.util import MLReadable, MLWritable

from sparkdeep import TorchModel, register
from sparkdeep.errors import ConfigError, ModelLoadError
from sparkdeep.models.registry import reference_of
from sparkdeep.spark.model.columns import Columns
from sparkdeep.spark.model.params import MODEL_PARAMS, values_of
from sparkdeep.storage.local import LocalStore
from sparkdeep.storage.manifest import decode, encode


@register
def halved(features):
    return features / 2


@register
def unzipped(data, scale=1.0):
    return torch.frombuffer(data, dtype=torch.float32).numpy() * scale


@register(name="first score")
def first(output):
    return output[:, 0]


def not_registered(features):
    return features


def made(**options):
    settings = {"module": Net().eval(), "schema": schema(), "reference": reference_of(Net, {"inputs": 2}), **options}
    return TorchModel(**settings)


def forge(folder, change):
    store = LocalStore(folder)
    body = decode(store.read("metadata.json"))
    change(body)
    store.write("metadata.json", encode(body))


# --- params


def test_every_setting_is_a_param_in_both_spellings():
    model = made(predictionCol="class", batch_size=7)
    assert {param.name for param in model.params} == set(MODEL_PARAMS)
    assert model.predictionCol is model.prediction_col
    assert (model.getPredictionCol(), model.getBatchSize(), model.getFeatureCols()) == ("class", 7, ["a", "b"])
    assert model.setProbabilityCol("p") is model
    assert model.getOrDefault("probability_col") == "p"
    assert "rows per forward pass in transform (default: 1024, current: 7)" in model.explainParams()
    with pytest.raises(AttributeError, match=r"batch_size = .* sets nothing: call setBatchSize"):
        model.batch_size = 9
    with pytest.raises(AttributeError, match=r"Did you mean 'setBatchSize'"):
        model.setBatchsize(9)
    with pytest.raises(ConfigError, match="Did you mean 'batch_size'"):
        made(batchsize=3)


def test_a_copy_has_params_of_its_own_and_the_same_network():
    model = made()
    other = model.copy({model.batch_size: 5})
    assert (other.getBatchSize(), model.getBatchSize()) == (5, 1024)
    assert other.uid == model.uid
    assert other.getModel() is other.model is model.model
    other.setPredictionCol("p")
    assert model.getPredictionCol() == "prediction"


def test_it_is_writable_and_readable_as_spark_ml_asks():
    assert isinstance(made(), MLWritable)
    assert issubclass(TorchModel, MLReadable)


def test_params_that_are_no_params_are_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match=r"params has the key 'batch_size'; its keys are Params"):
        made().transform(None, {"batch_size": 3})


@pytest.mark.parametrize(
    ("given", "columns"),
    [(["c", "d"], ("c", "d")), (("d", "a"), ("d", "a"))],
)
def test_the_features_may_lie_in_other_columns(given, columns):
    read = Columns.of(schema(), values_of(made(feature_cols=given)))
    assert read.features == columns
    assert read.renamed == dict(zip("ab", columns, strict=True))
    assert [f.columns for f in read.schema.fields if f.role == "label"] == [("y",)]


def test_the_setting_is_told_from_the_schema():
    for given in ("a", ["a"], ["a", "b"], {"x": "a", "z": ["b", "c"]}):
        assert made(schema=schema(given)).getFeatureCols() == given


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_cols": ["c"]}, r"feature_cols=\['c'\]: the model was trained on \['a', 'b'\]"),
        ({"feature_cols": {"x": ["c", "d"]}}, "give as many columns in the same form"),
        ({"feature_cols": 3}, "give as many columns in the same form"),
        ({"prediction_col": ""}, "prediction_col='': must be a column's name"),
        ({"probability_col": 3}, "probability_col=3: must be a column's name"),
        ({"raw_prediction_col": "Prediction"}, "'prediction' is the name of two columns to write"),
    ],
)
def test_columns_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Columns.of(schema(), values_of(made(**settings)))


def test_a_choice_is_checked_when_it_is_made():
    with pytest.raises(ConfigError, match="prediction='softmax'"):
        made().set_prediction("softmax")
    with pytest.raises(ConfigError, match=r"shape \(3, 3, 1\).*scores of the classes"):
        made(probability_col="p").set_prediction(lambda output: output.unsqueeze(2))
    with pytest.raises(ConfigError, match="batch_size=0: must be a whole number, at least 1"):
        made(batch_size=0).set_prediction(None)


# --- files


def test_a_folder_holds_the_model_and_what_pipelines_look_for(tmp_path):
    model = made()
    model.save(str(tmp_path / "m"))
    assert LocalStore(tmp_path / "m").list("") == ["metadata.json", "metadata/part-00000", "model.safetensors"]
    stage = json.loads((tmp_path / "m/metadata/part-00000").read_text())
    module, _, name = stage["class"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is TorchModel
    assert stage["uid"] == model.uid
    assert {"sparkVersion", "timestamp", "paramMap", "defaultParamMap"} <= stage.keys()


def test_weights_params_and_uid_come_back(tmp_path):
    model = made(predictionCol="class", feature_cols=["c", "d"], probability_col="p", prediction="argmax", batch_size=9)
    model.save(str(tmp_path / "m"))
    for again in (TorchModel.load(str(tmp_path / "m")), TorchModel.read().load(str(tmp_path / "m"))):
        assert again.uid == model.uid
        assert all(param.parent == model.uid for param in again.params)
        assert values_of(again) == values_of(model)
        assert {param.name for param in again._paramMap} == {param.name for param in model._paramMap}
        assert torch.equal(again.model.linear.weight, model.model.linear.weight)


def test_a_loaded_model_that_is_saved_again_still_names_its_class(tmp_path):
    first = made()
    first.save(str(tmp_path / "first"))
    TorchModel.load(str(tmp_path / "first")).save(str(tmp_path / "second"))
    assert torch.equal(TorchModel.load(str(tmp_path / "second")).model.linear.weight, first.model.linear.weight)
    # Loaded into what the name does not build, it has no name to give.
    TorchModel.load(str(tmp_path / "first"), model=lambda: Net()).save(str(tmp_path / "third"))
    with pytest.raises(ModelLoadError, match="does not name its model's class"):
        TorchModel.load(str(tmp_path / "third"))


def test_what_lies_there_is_replaced_only_when_told(tmp_path):
    folder = tmp_path / "m"
    made().save(str(folder), pickle=True)
    second = made(module=Net().eval())
    with pytest.raises(ConfigError, match=r"m holds 'metadata.json' already.*write\(\)\.overwrite\(\)\.save\(path\)"):
        second.save(str(folder))
    (folder / "note.txt").write_text("not a model's")
    second.write().overwrite().save(str(folder))
    assert torch.equal(TorchModel.load(str(folder)).model.linear.weight, second.model.linear.weight)
    assert LocalStore(folder).list("") == ["metadata.json", "metadata/part-00000", "model.safetensors", "note.txt"]


def test_a_folder_with_other_files_is_not_taken_for_free(tmp_path):
    (tmp_path / "report.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds 'report.txt' already"):
        made().save(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["report.txt"]


def test_an_empty_folder_and_a_file_uri_are_fine(tmp_path):
    made().save(str(tmp_path))
    made().write().save((tmp_path / "uri").as_uri())
    assert TorchModel.load((tmp_path / "uri").as_uri()).getFeatureCols() == ["a", "b"]


def test_a_relative_path_is_this_processs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made().save("models/m")
    assert (tmp_path / "models/m/metadata.json").is_file()
    TorchModel.load("models/m")


def test_callables_with_a_name_come_back_by_it(tmp_path):
    bytes_schema = schema({"x": "bytes", "w": "words"}, decode=unzipped, collate={"words": halved})
    model = made(
        schema=bytes_schema, preprocess=halved, decode={"bytes": unzipped}, collate={"words": halved}, prediction=first
    )
    model.save(str(tmp_path / "m"))
    again = TorchModel.load(str(tmp_path / "m"))
    assert again._callables == {"preprocess": halved, "decode": {"bytes": unzipped}, "collate": {"words": halved}}
    assert again.getPrediction() is first


def test_callables_without_a_name_are_asked_for(tmp_path):
    model = made(preprocess=not_registered, prediction=lambda output: output[:, 1])
    model.save(str(tmp_path / "m"))
    with pytest.raises(
        ModelLoadError, match=r"saved with preprocess that had no name.*pass preprocess= to TorchModel.load"
    ):
        TorchModel.load(str(tmp_path / "m"))
    with pytest.raises(ModelLoadError, match=r"saved with prediction .*call sparkdeep.register on it, and save again"):
        TorchModel.load(str(tmp_path / "m"), preprocess=not_registered)
    again = TorchModel.load(str(tmp_path / "m"), preprocess=not_registered, prediction="argmax")
    assert again._callables["preprocess"] is not_registered
    assert again.getPrediction() == "argmax"


def test_a_callable_that_was_given_takes_the_place_of_the_stored_one(tmp_path):
    made(preprocess=halved).save(str(tmp_path / "m"))
    assert TorchModel.load(str(tmp_path / "m"), preprocess=not_registered)._callables["preprocess"] is not_registered


@pytest.mark.parametrize(
    "name", ["os:system", "os:remove", f"{__name__}:not_registered", "subprocess:Popen", "sparkdeep_nowhere:f"]
)
def test_a_stored_name_that_nobody_allowed_is_refused_with_the_remedy(tmp_path, name):
    made(preprocess=halved).save(str(tmp_path / "m"))
    forge(tmp_path / "m", lambda body: body["meta"]["callables"].update(preprocess={"name": name}))
    with pytest.raises(ModelLoadError, match=r"preprocess: the stored .*is refused.*register.*or pass preprocess="):
        TorchModel.load(str(tmp_path / "m"))


def test_a_stored_partial_calls_nothing_while_it_loads(tmp_path):
    canary = tmp_path / "canary"
    made(preprocess=halved).save(str(tmp_path / "m"))
    stored = {"partial": "os:mkdir", "args": [str(canary)], "kwargs": {}}
    forge(tmp_path / "m", lambda body: body["meta"]["callables"].update(preprocess=stored))
    with pytest.raises(ModelLoadError, match="is refused"):
        TorchModel.load(str(tmp_path / "m"))
    assert not canary.exists()
    os.mkdir(canary)  # the canary would have been seen
    assert canary.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["meta"].pop("schema"),
        lambda body: body["meta"].pop("callables"),
        lambda body: body["meta"].update(callables=["preprocess"]),
        lambda body: body["meta"].update(params=3),
        lambda body: body["meta"].update(history=[1]),
        lambda body: body["meta"]["callables"].update(preprocess={"odd": 1}),
    ],
)
def test_damaged_metadata_are_named(tmp_path, change):
    made().save(str(tmp_path / "m"))
    forge(tmp_path / "m", change)
    with pytest.raises(ModelLoadError, match="damaged"):
        TorchModel.load(str(tmp_path / "m"))


@pytest.mark.parametrize("params", [{"color": "red"}, {"prediction_col": {"name": "os:system"}}])
def test_forged_params_are_refused(tmp_path, params):
    made().save(str(tmp_path / "m"))
    forge(tmp_path / "m", lambda body: body["meta"].update(params=params))
    with pytest.raises(ModelLoadError, match=r"color|is refused"):
        TorchModel.load(str(tmp_path / "m"))


def test_an_exported_file_is_not_overwritten_unasked(tmp_path):
    model, path = made(preprocess=halved), str(tmp_path / "net.pt2")
    model.export(path)
    x = torch.randn(5, 2)
    with torch.no_grad():
        expected = model.model(x / 2)
    torch.testing.assert_close(torch.export.load(path).module()(x), expected)
    before = Path(path).read_bytes()
    with pytest.raises(ConfigError, match=r"net\.pt2' is there already.*overwrite=True"):
        model.export(path)
    assert Path(path).read_bytes() == before
    model.export(path, overwrite=True)
    with pytest.raises(ConfigError, match="names no file"):
        model.export(str(tmp_path) + "/")
