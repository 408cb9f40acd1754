"""Names that files hold: they resolve, to what they meant, for as long as there are such files."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import cloudpickle
import pytest
from paths import ROOT
from pyspark.ml.util import DefaultParamsReader

import sparkdeep
from sparkdeep.algorithms import delayed_nesterov, downpour, fedadam, fedyogi, slowmo
from sparkdeep.errors import ModelLoadError
from sparkdeep.models.registry import import_factory
from sparkdeep.rounds.identity import describe
from sparkdeep.spark.fit.settings import FitSettings, digest_of
from sparkdeep.spark.model.stored_values import NAMED_SETTINGS, from_json, to_json
from sparkdeep.storage.own_names import with_first_modules, without_modules

# As they are written now.
CLASS_PATHS = {"sparkdeep.TorchEstimator": "TorchEstimator", "sparkdeep.TorchModel": "TorchModel"}
# As the first version wrote them.
FIRST_CLASS_PATHS = {
    "sparkdeep.spark.estimator.TorchEstimator": "TorchEstimator",
    "sparkdeep.spark.model.TorchModel": "TorchModel",
}
LOADERS = ("sparkdeep.pyfunc", "sparkdeep.spark.pyfunc")
OTHERS = {
    "sparkdeep.keras_network": "_rebuilt",  # pickles of Keras models
    "sparkdeep.spark.daemon": "main",  # the property spark.python.daemon.module
    "sparkdeep.report": "main",  # python -m, in people's scripts
}

# What the first version named in descriptions of runs, and so in checkpoints and in the names of a search's folders.
FIRST_MODULES = {
    "sparkdeep.aggregators": ["Median", "NormClip", "RadialDirectional", "TrimmedMean"],
    "sparkdeep.asynchrony": ["Asynchronous"],
    "sparkdeep.config": ["EarlyStopping"],
    "sparkdeep.drift": ["FedProx", "Scaffold"],
    "sparkdeep.local_work": ["AdaComm", "DyLU", "Epochs", "PostLocal", "QSR", "WarmStart"],
}
OUTER = {
    preset.settings["outer_optimizer"].func.__name__: preset.settings["outer_optimizer"]
    for preset in (delayed_nesterov(), downpour(), fedadam(), fedyogi(), slowmo())
}


# As above, of what is private or seldom.
FIRST_MODULES_OF_OTHERS = {
    "sparkdeep.data.codecs": ["FieldDecoder"],
    "sparkdeep.data.unischema": ["UnischemaField"],
    "sparkdeep.injection": ["Carrier"],
    "sparkdeep.interop": ["OwnLoss"],
    "sparkdeep.lightning_module": ["Clock", "LightningStep", "ModuleLog"],
    "sparkdeep.lightning_optimizer": ["LightningOptimizer"],
    "sparkdeep.outer_optimizers": list(OUTER),
}


def own_classes():
    return [getattr(sparkdeep, name) for names in FIRST_MODULES.values() for name in names] + [
        outer.func for outer in OUTER.values()
    ]


@pytest.mark.parametrize(("path", "name"), [*CLASS_PATHS.items(), *FIRST_CLASS_PATHS.items()])
def test_class_paths_resolve_as_spark_ml_resolves_them(path, name):
    assert DefaultParamsReader._DefaultParamsReader__get_class(path) is getattr(sparkdeep, name)


@pytest.mark.parametrize(("path", "name"), CLASS_PATHS.items())
def test_stages_are_written_under_their_public_names(path, name):
    stage = getattr(sparkdeep, name)
    assert f"{stage.__module__}.{stage.__name__}" == path
    for pickler in (pickle, cloudpickle):
        held = pickler.dumps(stage)
        assert len(held) < 100, "by name, not by value"
        assert pickle.loads(held) is stage


@pytest.mark.parametrize("module", LOADERS)
def test_loaders_of_logged_models_resolve(module):
    from sparkdeep.pyfunc import _load_pyfunc

    assert __import__(module, fromlist=["_load_pyfunc"])._load_pyfunc is _load_pyfunc


@pytest.mark.parametrize(("module", "name"), OTHERS.items())
def test_other_modules_that_are_named_outside_resolve(module, name):
    assert callable(getattr(__import__(module, fromlist=[name]), name))


@pytest.mark.parametrize("module", ["sparkdeep.report", "sparkdeep"])
def test_modules_that_are_run_run(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert "usage:" in done.stdout


def test_the_daemons_name_is_that_of_the_configurations():
    assert "sparkdeep.spark.daemon" in (ROOT / "conf/standalone.conf").read_text(encoding="utf-8")


# -- stored settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OUTER)
def test_outer_optimizers_are_stored_without_their_module_and_found_under_either_name(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "sparkdeep.outer_optimizers", None)  # as if it had moved
    outer = OUTER[name]
    stored = to_json(outer, "outer_optimizer")
    assert stored["partial"] == f"sparkdeep:{name}"
    for spelling in (f"sparkdeep:{name}", f"sparkdeep.outer_optimizers:{name}"):
        found = from_json(json.loads(json.dumps({**stored, "partial": spelling})), "outer_optimizer")
        assert (found.func, found.keywords) == (outer.func, outer.keywords)
        assert import_factory(spelling) is outer.func


def test_other_names_of_ours_are_refused_in_files_as_ever():
    for name in ("sparkdeep:doctor", "sparkdeep.registry:import_factory", "sparkdeep.outer_optimizers:_Outer.step"):
        with pytest.raises(ModelLoadError, match="refused"):
            from_json({"name": name}, "loss")


# -- descriptions of runs -----------------------------------------------------------------------------------------------


def test_every_value_that_a_run_may_be_described_by_has_a_name_here():
    values = {name for setting, known in NAMED_SETTINGS.items() if setting != "algorithm" for name in known}
    assert {*values, "EarlyStopping"} == {name for names in FIRST_MODULES.values() for name in names}


def test_classes_of_ours_are_described_without_their_module():
    assert [describe(cls) for cls in own_classes()] == [f"sparkdeep:{cls.__name__}" for cls in own_classes()]
    assert describe(sparkdeep.FedProx(0.5)) == {"class": "sparkdeep:FedProx", "mu": 0.5}
    assert describe(OUTER["SlowMo"])[0] == "sparkdeep:SlowMo"


def test_classes_of_users_keep_theirs():
    def made(module):
        return type("Net", (), {"__module__": module})

    names = [describe(made(module)) for module in ("nets", "sparkdeep_nets", "my.sparkdeep.nets")]
    assert names == ["nets:Net", "sparkdeep_nets:Net", "my.sparkdeep.nets:Net"]
    assert without_modules(names) == names


def test_a_description_by_the_first_version_is_read_as_one_of_today():
    first = {
        "algorithm": ["local", {"class": "sparkdeep.local_work:QSR", "alpha": 0.5}, None, "mean"],
        "outer_optimizer": ["sparkdeep.outer_optimizers:FedAdam", [], {"lr": 0.1}],
        "lr_scheduler": "sparkdeep.lightning_optimizer:LightningOptimizer.scheduler",
        "decode": {"x": {"class": "sparkdeep.data.codecs:FieldDecoder"}},
        "loss": "nets.sparkdeep:loss",
        "augment": "sparkdeep.augment: what a user calls so",
    }
    assert without_modules(first) == {
        "algorithm": ["local", {"class": "sparkdeep:QSR", "alpha": 0.5}, None, "mean"],
        "outer_optimizer": ["sparkdeep:FedAdam", [], {"lr": 0.1}],
        "lr_scheduler": "sparkdeep:LightningOptimizer.scheduler",
        "decode": {"x": {"class": "sparkdeep:FieldDecoder"}},
        "loss": "nets.sparkdeep:loss",
        "augment": "sparkdeep.augment: what a user calls so",
    }


@pytest.mark.parametrize(("module", "names"), [*FIRST_MODULES.items(), *FIRST_MODULES_OF_OTHERS.items()])
def test_digests_are_taken_of_the_names_that_the_first_version_had(module, names):
    first = json.dumps({"a": [f"{module}:{name}" for name in names], "b": f"{module}:{names[0]}.method"})
    today = json.dumps(without_modules(json.loads(first)))
    assert today != first
    assert with_first_modules(today) == first


@pytest.mark.parametrize("cls", own_classes(), ids=lambda cls: cls.__name__)
def test_nothing_that_is_written_changes_when_a_class_moves(cls, monkeypatch):
    def written():
        settings = {"model": cls, "loss": cls, "optimizer": cls, "feature_cols": "x", "label_cols": "y"}
        digest = digest_of(FitSettings.of(settings), {"outer_optimizer": describe(cls)})
        return describe(cls), digest, to_json(OUTER["SlowMo"], "outer_optimizer")

    before = written()
    monkeypatch.setattr(cls, "__module__", "sparkdeep.elsewhere")
    assert written() == before
