"""The presets: values to print, change and store; each trains; what does not fit is refused."""

from __future__ import annotations

import copy
import math
import pickle
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad
from twin import deal, run, schema_of

from sparkdeep import TorchEstimator, algorithms
from sparkdeep.algorithms import ALGORITHMS, Algorithm, diloco
from sparkdeep.errors import ConfigError
from sparkdeep.models.program import Program
from sparkdeep.optim.local_work import QSR
from sparkdeep.spark.model.stored_values import from_json, to_json

SMALL = {
    "averaging": {},
    "bmuf": {"sync_every": 2},
    "delayed_nesterov": {
        "optimizer": partial(torch.optim.AdamW, lr=0.02),
        "asynchronous": algorithms.Asynchronous(2, 2),
    },
    "diloco": {"sync_every": 2, "optimizer": partial(torch.optim.AdamW, lr=0.02)},
    "downpour": {"schedule": algorithms.WarmStart(3)},
    "fedadagrad": {},
    "fedadam": {},
    "fedyogi": {},
    "lbfgs": {"epochs": 12, "portions": None},
    "lookahead": {},
    "slowmo": {"sync_every": 2},
}
"""What makes a preset fit a table of 48 rows."""


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def table():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(48, 4))
    return x, np.tanh(x @ rng.normal(size=(4, 1)))


def trained(tmp_path, algorithm, **options):
    settings = {"epochs": 6, "batch_size": 4, **algorithm.settings, **options}
    optimizer = settings.pop("optimizer", partial(SGD, lr=0.1))
    own = Program(model=network(), loss=nn.MSELoss(), optimizer=optimizer)
    x, y = table()
    if settings.get("outer_optimizer") is None:
        settings.pop("outer_optimizer", None)
    _, records, fit = run(tmp_path, own, deal(x, y, [24, 24]), schema_of(x, y), **settings)
    return own.model, records, fit


def loss_of(model):
    x, y = (torch.from_numpy(a) for a in table())
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(x), y))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_preset_trains(tmp_path, name):
    model, records, _ = trained(tmp_path, ALGORITHMS[name]().replace(**SMALL[name]))
    assert all(math.isfinite(record.loss) for record in records)
    assert loss_of(model) < 0.7 * loss_of(network())


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_preset_can_be_printed_changed_copied_and_stored(name):
    preset = ALGORITHMS[name]()
    assert preset.name == name
    assert repr(preset).startswith(f"{name}(")
    assert "functools" not in repr(preset)
    assert preset.source
    changed = preset.replace(batch_size=7)
    assert changed.settings["batch_size"] == 7
    assert "batch_size" not in preset.settings
    for again in (
        copy.deepcopy(preset),
        pickle.loads(pickle.dumps(preset)),
        from_json(to_json(preset, "algorithm"), "algorithm"),
    ):
        assert repr(again) == repr(preset)


def test_a_preset_shows_its_papers_defaults():
    assert repr(diloco()) == (
        "diloco(optimizer=AdamW(lr=0.0004, betas=(0.9, 0.95), weight_decay=0.1), "
        "outer_optimizer=SGD(lr=0.7, momentum=0.9, nesterov=True), sync_every=500, inner_state='keep')"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: diloco().replace(sync_evry=3),
            r"unknown setting of the algorithm 'diloco': 'sync_evry'\. Did you mean 'sync_every'",
        ),
        (lambda: Algorithm("mine", {"model": nn.Linear}), r"'model'"),
        (lambda: estimator(algorithm="dilocco"), r"unknown algorithm 'dilocco'\. Did you mean 'diloco'"),
        (lambda: estimator(algorithm=diloco), r"algorithm=.*must be a preset.*Call it: diloco\(\)\."),
        (lambda: estimator(algorithm=3), r"algorithm=3: must be a preset such as diloco\(\)"),
        (lambda: estimator(algorithm="diloco", outer_optimizer=0.7), r"outer_optimizer=0\.7: must be callable"),
        (lambda: estimator(algorithm="diloco", quorum=3), r"quorum=3: there are num_workers=2"),
    ],
)
def test_what_is_no_preset_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# -- in the estimator ------------------------------------------------------------------------------------------------


def estimator(**options):
    settings = {"model": nn.Linear(2, 1), "loss": nn.MSELoss(), "feature_cols": ["a", "b"], "label_cols": "y"}
    return TorchEstimator(**{**settings, **options})


def test_a_preset_fills_in_what_was_not_set():
    made = estimator(algorithm=diloco()).settings()
    assert (made.run.sync_every, made.local.inner_state) == (500, "keep")
    assert made.optimizer.keywords["lr"] == 4e-4
    assert made.outer_optimizer.func is SGD
    assert estimator(algorithm="diloco").settings().run.sync_every == 500


def test_what_was_set_wins_whenever_it_was_set():
    made = estimator(algorithm=diloco(), sync_every=30, optimizer=Adagrad)
    assert (made.settings().run.sync_every, made.settings().optimizer) == (30, Adagrad)
    made.setSyncEvery(40)
    assert made.settings().run.sync_every == 40
    grown = made.copy({made.sync_every: 50, made.algorithm: algorithms.slowmo()})
    assert grown.settings().run.sync_every == 50
    assert grown.settings().outer_optimizer.func.__name__ == "SlowMo"
    rated = estimator(algorithm=diloco(), learning_rate=0.5).settings()
    assert rated.optimizer.keywords["lr"] == 0.5


def test_rules_and_values_of_settings_are_stored_by_their_fields():
    for value in (QSR(0.3), algorithms.WarmStart(3, then=QSR(0.1)), algorithms.Asynchronous(2, 4, 8)):
        assert from_json(to_json(value, "x"), "x") == value


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "downpour",
            {"optimizer": partial(torch.optim.AdamW, lr=0.01)},
            "Downpour with the optimizer AdamW: .* no sum of gradients",
        ),
        ("delayed_nesterov", {}, r"DelayedNesterov\(delay=4\) with num_workers=2: .* Give delay=2"),
    ],
)
def test_what_means_something_else_is_said_aloud(tmp_path, caplog, name, options, said):
    trained(tmp_path, ALGORITHMS[name]().replace(**{**SMALL[name], **options}), epochs=1)
    assert re.search(said, caplog.text)
    caplog.clear()
    trained(tmp_path, ALGORITHMS["downpour"]().replace(**SMALL["downpour"]), epochs=1)
    assert not caplog.records
