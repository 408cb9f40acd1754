"""An estimator's metadata, written and read without a JVM: the same settings, and no name outside the rules."""

from __future__ import annotations

import json
import types
from functools import partial

import pytest
import torch
from pyspark.ml.util import DefaultParamsReader, DefaultParamsWriter
from torch import nn

from sparkdeep import EarlyStopping, TorchEstimator, register
from sparkdeep.errors import ConfigError, ModelLoadError
from sparkdeep.spark.fit.estimator_files import EstimatorReader, EstimatorWriter


@register
class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(2, width)

    def forward(self, x):
        return self.linear(x)


@register
def halved(x):
    return x / 2


def estimator(**options):
    settings = {
        "model": Net,
        "loss": nn.MSELoss(),
        "optimizer": torch.optim.SGD,
        "feature_cols": "x",
        "label_cols": "y",
    }
    return TorchEstimator(**{**settings, **options})


class Files:
    """Where the metadata would lie, as text."""

    def __init__(self):
        self.text = ""

    def save(self, made):
        writer = EstimatorWriter(made)
        writer._sparkSession = types.SimpleNamespace(version="4.3.0", sparkContext=None)
        writer.saveImpl("folder")

    def load(self, **options):
        reader = EstimatorReader(TorchEstimator, **options)
        reader._sparkSession = types.SimpleNamespace(sparkContext=None)
        return reader.load("folder")


@pytest.fixture
def files(monkeypatch):
    made = Files()

    def write(instance, path, session, extraMetadata=None, paramMap=None):
        fake = types.SimpleNamespace(version="4.3.0")
        made.text = DefaultParamsWriter._get_metadata_to_save(instance, fake, extraMetadata, paramMap)

    monkeypatch.setattr(DefaultParamsWriter, "saveMetadata", staticmethod(write))
    monkeypatch.setattr(DefaultParamsReader, "loadMetadata", staticmethod(lambda path, session: json.loads(made.text)))
    return made


def test_settings_come_back_as_they_were_set(files):
    made = estimator(
        model_args={"width": 3},
        optimizer=partial(torch.optim.AdamW, lr=0.1, betas=(0.8, 0.9)),
        feature_cols={"x": ["a", "b"]},
        preprocess=halved,
        validation=0.2,
        early_stopping=EarlyStopping(patience=2),
        metrics={"mse": nn.functional.mse_loss},
        coordinator_port=(4000, 4010),
        sync_every="epoch",
    )
    files.save(made)
    again = files.load()
    assert again.uid == made.uid
    assert {param.name for param in again.params if again.isSet(param)} == {
        param.name for param in made.params if made.isSet(param)
    }
    for param in made.params:
        if made.isSet(param) and param.name not in ("loss", "optimizer"):
            assert again.getOrDefault(param.name) == made.getOrDefault(param.name)
    assert again.getOptimizer().keywords == {"lr": 0.1, "betas": (0.8, 0.9)}
    assert type(again.getLoss()) is nn.MSELoss
    assert again.settings().run == made.settings().run


def test_a_model_given_by_name_is_held_to_the_same_rules(files):
    files.save(estimator(model=f"{__name__}:Net"))
    assert files.load().getModel() is Net
    with pytest.raises(ConfigError, match=r"model \(getcwd\)"):
        files.save(estimator(model="os:getcwd"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": lambda output, y: 0}, r"loss \(<lambda>\).*@sparkdeep.register"),
        ({"callbacks": [print]}, r"callbacks\[0\] \(print\)"),
        ({"validation": types.SimpleNamespace()}, "validation is of class SimpleNamespace.*fraction"),
        ({"model": nn.Sequential(nn.Linear(2, 1))}, "model is a Sequential.*model_args"),
        ({"model_args": {"width": object()}}, r"model_args\['width'\] is of class object"),
    ],
    ids=["loss", "callbacks", "validation", "model", "argument"],
)
def test_a_param_that_cannot_be_saved_is_named(files, options, message):
    with pytest.raises(ConfigError, match=message):
        files.save(estimator(**options))
    assert files.text == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paramMap": {"model": {"name": "os:getcwd"}}}, "model: .*'os:getcwd' is refused"),
        ({"paramMap": {"model": {"partial": "os:system", "args": ["id"], "kwargs": {}}}}, "'os:system' is refused"),
        ({"paramMap": {"epochs": 0}}, "cannot be made: epochs=0"),
        ({"paramMap": {"epoch": 1}}, "cannot be made: unknown.*'epoch'. Did you mean 'epochs'"),
        ({"sparkdeep": {"format_version": 9}}, "format 9"),
        ({"sparkdeep": None}, "format None"),
    ],
    ids=["function", "partial", "value", "unknown", "later", "none"],
)
def test_what_was_changed_or_comes_from_elsewhere_is_refused(files, change, message):
    files.save(estimator())
    stored = json.loads(files.text)
    for key, value in change.items():
        stored[key] = {**stored[key], **value} if isinstance(value, dict) else value
    files.text = json.dumps(stored)
    with pytest.raises(ModelLoadError, match=message):
        files.load()


def test_a_listed_module_may_be_named(files):
    files.save(estimator())
    stored = json.loads(files.text)
    stored["paramMap"]["preprocess"] = {"name": f"{__name__}:plain"}
    files.text = json.dumps(stored)
    with pytest.raises(ModelLoadError, match="preprocess"):
        files.load()
    assert files.load(allow_modules=[__name__]).getPreprocess() is plain


def plain(x):
    return x
