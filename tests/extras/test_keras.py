"""Keras 3 models on the torch backend, trained with torch's losses and optimizers."""

from __future__ import annotations

import pickletools
from functools import partial

import cloudpickle
import numpy as np
import pytest
import torch
from first_version import EXPECTED, FOLDER, written
from foreign_models import blobs, two_towers
from plain_loop import train_plainly
from torch import nn
from twin import deal, facts_of, run, schema_of, write_shards

from sparkdeep import ConfigError, TorchEstimator, TorchModel
from sparkdeep.models.building import build_model
from sparkdeep.models.keras import KerasNetwork
from sparkdeep.models.packing import copied, pack_program, unpack_program
from sparkdeep.models.program import Program

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("default")]

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


@pytest.fixture(scope="module")
def keras(spark):
    """Imported once the JVM stands, so that executors do not inherit the driver's choice of a backend."""
    import keras

    assert keras.backend.backend() == "torch"
    return keras


def network(keras, dropout=0.0, momentum=0.5, trainable=True):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation="relu", trainable=trainable),
            keras.layers.BatchNormalization(momentum=momentum),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(3),
        ]
    )


def fit(tmp_path, model, x, y, sizes, **options):
    program = copied(Program(model=build_model(model, {}, 0), loss=nn.CrossEntropyLoss(), optimizer=SGD))
    options = {"epochs": 3, "batch_size": 16, "sync_every": 2, **options}
    return run(tmp_path, program, deal(x, y, sizes), schema_of(x, y), **options)


class InTraining(nn.Module):
    """The Keras model itself, in a plain torch loop."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x, training=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_replica_equals_a_plain_loop_over_the_keras_model(keras, tmp_path, dropout):
    x, y = blobs(70)
    (facts,) = facts_of(write_shards(tmp_path / "for-its-digest", deal(x, y, [70]), schema_of(x, y)))
    reference, ours = network(keras, dropout), network(keras, dropout)
    before = [v.numpy().copy() for v in ours.variables]
    train_plainly(
        InTraining(reference),
        x,
        y,
        digest=facts.digest,
        loss=nn.CrossEntropyLoss(),
        optimizer=SGD,
        epochs=3,
        batch_size=16,
    )
    trained, _, _ = fit(tmp_path, ours, x, y, [70])
    assert isinstance(trained.network, keras.Model)
    pairs = list(zip(trained.network.variables, reference.variables, strict=True))
    assert len(pairs) == 8 + (dropout > 0)
    for got, expected in pairs:
        if "seed" not in expected.path:
            assert np.array_equal(got.numpy(), expected.numpy()), expected.path
    assert not np.array_equal(before[0], trained.network.variables[0].numpy())
    assert all(np.array_equal(a, v.numpy()) for a, v in zip(before, ours.variables, strict=True)), (
        "the given one is left"
    )


def test_moving_averages_of_replicas_are_those_of_all_rows(keras, tmp_path):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(-3, 1, size=(200, 8)), rng.normal(5, 2, size=(600, 8))]).astype(np.float32)
    y = np.zeros(800, np.int64)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.BatchNormalization(momentum=0.0), keras.layers.Dense(3)])
    trained, _, _ = fit(tmp_path, model, x, y, [200, 600], epochs=1, batch_size=1000, sync_every=1)
    norm = trained.network.layers[0]
    np.testing.assert_allclose(norm.moving_mean.numpy(), x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.moving_variance.numpy(), x.var(0), rtol=1e-4)
    naive = (200 * x[:200].var(0) + 600 * x[200:].var(0)) / 800
    assert (np.abs(norm.moving_variance.numpy() - naive) > 5).all()


def test_copies_and_pickles_hold_the_same_network(keras):
    first = build_model(network(keras, 0.3, trainable=False), {}, 0)
    assert [name for name, _ in first.named_parameters()] == ["2/gamma", "3/beta", "7/kernel", "8/bias"]
    second = copied(Program(model=first, loss=None, optimizer=SGD)).model
    third = unpack_program(pack_program(Program(model=first, loss=None, optimizer=SGD))).model
    third.load_state_dict(first.state_dict())
    x = torch.randn(5, 8)
    for other in (second, third):
        assert isinstance(other, KerasNetwork)
        assert other.network is not first.network
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in first.named_parameters()]
        assert torch.equal(other.eval()(x), first.eval()(x))
        with torch.no_grad():
            next(other.parameters()).add_(1.0)
        assert not torch.equal(other(x), first(x)), "the Keras variables share the torch parameters, not the copy's"


def test_a_pickle_names_one_module_of_ours_and_the_first_versions_is_read(keras):
    held = cloudpickle.dumps(build_model(network(keras, 0.3), {}, 0))
    told = [argument for _, argument, _ in pickletools.genops(held) if isinstance(argument, str)]
    assert {name for name in told if name.startswith("sparkdeep")} == {"sparkdeep.keras_network"}, (
        "files name it: it stays, see tests/repository/test_names_in_files.py"
    )
    first = TorchModel.load(str(FOLDER / "keras"), trust_pickle=True)
    assert first.model(torch.tensor(written.ROWS)).tolist() == [
        pytest.approx(row, abs=1e-6) for row in EXPECTED["keras"]
    ]


def test_dropout_follows_train_and_eval(keras):
    module = build_model(network(keras, 0.5), {}, 0)
    x = torch.ones(5, 8)
    assert torch.equal(module.eval()(x), module(x))
    assert not torch.equal(module.train()(x), module(x))


def test_what_cannot_be_trained_is_refused_by_name(keras):
    with pytest.raises(ConfigError, match="is not built yet"):
        build_model(keras.Sequential([keras.layers.Dense(3)]), {}, 0)
    with pytest.raises(ConfigError, match="is a Keras layer"):
        build_model(nn.Sequential(nn.Linear(8, 8), keras.layers.Dense(3)), {}, 0)

    class Forgetful(keras.Model):
        def __init__(self, width=2):
            super().__init__()
            self.dense = keras.layers.Dense(width)

        def get_config(self):
            return {}

        def call(self, x):
            return self.dense(x)

    forgetful = Forgetful(5)
    forgetful(torch.zeros(1, 8))
    with pytest.raises(ConfigError, match="cannot be built again from its get_config"):
        copied(Program(model=build_model(forgetful, {}, 0), loss=None, optimizer=SGD))
    two = build_model(two_towers(), {}, 0)
    with pytest.raises(ConfigError, match=r"names the inputs \['nummers'\]"):
        two(nummers=torch.zeros(1, 8))


def table(spark, rows):
    x, y = blobs(rows)
    return spark.createDataFrame(
        [(a.tolist(), int(b) % 4, int(b)) for a, b in zip(x, y, strict=True)],
        "numbers array<float>, kind bigint, label bigint",
    )


def estimator(model, **options):
    settings = {
        "model": model,
        "loss": nn.CrossEntropyLoss(),
        "optimizer": SGD,
        "feature_cols": "numbers",
        "label_cols": "label",
        "num_workers": 2,
        "batch_size": 16,
        "epochs": 4,
        "sync_every": 4,
        "prediction": "argmax",
        "progress": False,
        **options,
    }
    return TorchEstimator(**settings)


def right(model, rows):
    return model.transform(rows).selectExpr("avg(double(label = prediction))").first()[0]


def test_fit_on_spark_trains_scores_saves_and_loads(keras, spark, tmp_path):
    rows = table(spark, 300)
    given = network(keras, 0.1)
    model = estimator(given, validation=0.2).fit(rows)
    assert right(model, rows) > 0.95
    features = np.array([r.numbers for r in rows.collect()], np.float32)
    scored = [r.prediction for r in model.transform(rows).collect()]
    assert (model.model.network.predict(features, verbose=0).argmax(1) == scored).all(), "Keras' own predict agrees"
    model.save(str(tmp_path / "model"))
    again = TorchModel.load(str(tmp_path / "model"), model=network(keras, 0.1))
    assert [r.prediction for r in again.transform(rows).collect()] == scored


def test_named_inputs_and_a_factory(keras, spark):
    rows = table(spark, 300)
    model = estimator(two_towers, feature_cols={"numbers": "numbers", "kind": "kind"}).fit(rows)
    assert right(model, rows) > 0.95
