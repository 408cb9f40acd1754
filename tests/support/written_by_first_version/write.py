"""Writes the folders beside this file; run with the first version of sparkdeep, see README.md.

Imports inside functions named write_* are that version's: they stay as they are when modules move.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
ROWS = [[(i % 5 - 2) / 2, (i % 7 - 3) / 3, (i % 3 - 1) / 1] for i in range(24)]
LABELS = [int(a + b > 0) for a, b, _ in ROWS]


def network():
    torch.manual_seed(1)
    return nn.Linear(3, 2)


def outer_optimizer():
    from sparkdeep.algorithms import fedadam

    return fedadam(lr=0.2, betas=(0.8, 0.9)).settings["outer_optimizer"]


def settings():
    """Arguments of an estimator that hold objects of ours, one of each kind."""
    from sparkdeep import QSR, EarlyStopping, FedProx, TrimmedMean

    return {
        "model": nn.Linear,
        "model_args": {"in_features": 3, "out_features": 2},
        "loss": nn.CrossEntropyLoss(label_smoothing=0.1),
        "optimizer": partial(torch.optim.SGD, lr=0.3),
        "outer_optimizer": outer_optimizer(),
        "aggregator": TrimmedMean(0.25),
        "schedule": QSR(alpha=0.5),
        "drift_correction": FedProx(mu=0.05),
        "early_stopping": EarlyStopping(patience=2, min_delta=0.125),
        "validation": 0.25,
        "metrics": {"nll": nn.functional.cross_entropy},
        "epochs": 2,
        "batch_size": 4,
        "sync_every": 1,
        "label_cols": "label",
        "progress": False,
    }


def options():
    """Settings of that run, with objects of ours."""
    from sparkdeep import FedProx, TrimmedMean

    return {
        "outer_optimizer": outer_optimizer(),
        "drift_correction": FedProx(mu=0.05),
        "aggregator": TrimmedMean(0.25),
        "epochs": 2,
        "batch_size": 4,
        "sync_every": 1,
        "checkpoint_every": 1,
    }


def keep(folder, name):
    """Without Hadoop's checksums and other files which are no part of what is read."""
    target = HERE / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder / name, target, ignore=shutil.ignore_patterns("*.crc", "_SUCCESS", "registered_model_meta"))


def write_stages(folder):
    """What Spark ML saves; returns the predictions."""
    from pyspark.ml import Pipeline
    from pyspark.ml.evaluation import MulticlassClassificationEvaluator
    from pyspark.ml.feature import VectorAssembler
    from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
    from pyspark.sql import SparkSession

    from sparkdeep import TorchEstimator
    from sparkdeep.algorithms import slowmo

    spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    rows = [(i, *row, row, label) for i, (row, label) in enumerate(zip(ROWS, LABELS, strict=True))]
    frame = spark.createDataFrame(rows, "id int, a double, b double, c double, x array<double>, label bigint")

    def predicted(fitted, column):
        scored = sorted(fitted.transform(frame).collect(), key=lambda row: row["id"])
        return [[float(value) for value in row[column]] for row in scored]

    estimator = TorchEstimator(**settings(), feature_cols="x", probability_col="probability", num_workers=2)
    estimator.save(str(folder / "estimator"))
    model = estimator.fit(frame)
    model.save(str(folder / "model"))

    in_pipeline = TorchEstimator(
        **{**settings(), "algorithm": slowmo(), "outer_optimizer": None, "schedule": None},
        feature_cols="features",
        num_workers=2,
    )
    for name in ("outer_optimizer", "schedule"):
        in_pipeline.clear(in_pipeline.getParam(name))
    pipeline = Pipeline(stages=[VectorAssembler(inputCols=["a", "b", "c"], outputCol="features"), in_pipeline])
    pipeline.save(str(folder / "pipeline"))
    fitted = pipeline.fit(frame)
    fitted.save(str(folder / "pipeline_model"))

    search = CrossValidator(
        estimator=estimator,
        estimatorParamMaps=ParamGridBuilder().addGrid(estimator.epochs, [1, 2]).build(),
        evaluator=MulticlassClassificationEvaluator(),
        numFolds=2,
    )
    search.save(str(folder / "search"))
    told = {"model": predicted(model, "probability"), "pipeline_model": predicted(fitted, "prediction")}
    spark.stop()
    for name in ("estimator", "model", "pipeline", "pipeline_model", "search"):
        keep(folder, name)
    return told


def write_checkpoint(folder):
    """Three rounds of a run in the in-process twin; returns the parameters at its end, and the digest of such a search."""
    import numpy as np
    from sparkdeep.checkpoint import CheckpointDirectory
    from sparkdeep.config import LocalSettings, RunSettings
    from sparkdeep.identity import run_identity
    from sparkdeep.program import Program
    from sparkdeep.spark.settings import FitSettings, digest_of
    from sparkdeep.store import LocalStore
    from twin import deal, facts_of, flat, local_coordinator, make_fit, schema_of, write_shards

    x, y = np.array(ROWS, dtype=np.float32), np.array(LABELS)
    dealt, schema, given = deal(x, y, [12, 12]), schema_of(x, y), options()

    def program():
        return Program(model=network(), loss=nn.CrossEntropyLoss(), optimizer=partial(torch.optim.SGD, lr=0.3))

    def run(checkpoints, stop_after=None):
        coordinator = local_coordinator()
        try:
            fit = make_fit(
                folder, program(), dealt, schema, coordinator=coordinator, checkpoints=checkpoints, **options()
            )
            rounds = fit.rounds()
            for record in rounds:
                if record.round == stop_after:
                    break
            rounds.close()
            fit.load_result()
            return flat(fit.program.model).tolist()
        finally:
            coordinator.close()

    (folder / "identity").mkdir()
    identity = run_identity(
        program(),
        LocalSettings(batch_size=given["batch_size"], drift_correction=given["drift_correction"]),
        RunSettings(num_workers=2, aggregator=given["aggregator"], sync_every=given["sync_every"]),
        facts_of(write_shards(folder / "identity", dealt, schema)),
        schema=schema.to_json(),
        outer_optimizer=given["outer_optimizer"],
        warm_start=None,
    )
    socket.gethostname = lambda: "driver.example.com"
    run(CheckpointDirectory(LocalStore(folder / "checkpoint"), identity=identity, keep=1), stop_after=3)
    keep(folder, "checkpoint")
    of_search = FitSettings.of({**settings(), "feature_cols": "x", "num_workers": 2})
    return {"checkpoint": run(None), "digest": digest_of(of_search, {**identity, "shards": []})}


def write_mlflow(folder):
    """A logged model; returns its predictions."""
    import mlflow
    import pandas as pd
    from sparkdeep.registry import reference_of

    from sparkdeep import TorchModel
    from sparkdeep.data.schema import ColumnType, build_schema
    from sparkdeep.tracking import log_model

    schema = build_schema(
        types={name: ColumnType(kind="scalar", dtype="float64") for name in "abc"},
        feature_cols=["a", "b", "c"],
        label_cols=None,
        weight_col=None,
    )
    reference = reference_of(nn.Linear, {"in_features": 3, "out_features": 2})
    model = TorchModel(
        module=network().eval(), schema=schema, reference=reference, probability_col="probability", preprocess=nn.Tanh()
    )
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    experiment = mlflow.create_experiment("first", artifact_location=(folder / "artifacts").as_uri())
    mlflow.set_experiment(experiment_id=experiment)
    with mlflow.start_run():
        info = log_model(model)
    scored = mlflow.pyfunc.load_model(info.model_uri).predict(pd.DataFrame(ROWS, columns=["a", "b", "c"]))
    mlflow.artifacts.download_artifacts(info.model_uri, dst_path=str(folder / "mlflow"))
    # Where it was logged is no part of what is read.
    described = folder / "mlflow" / "MLmodel"
    described.write_text(re.sub(r"(?m)^artifact_path: .*$", "artifact_path: model", described.read_text()))
    keep(folder, "mlflow")
    return {"mlflow": [[float(value) for value in row] for row in scored["probability"]]}


def write_keras(folder):
    """A Keras model, which is saved as a pickle of the library's own; returns its output."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    from sparkdeep.building import build_model

    from sparkdeep import TorchModel
    from sparkdeep.data.schema import ColumnType, build_schema

    keras.utils.set_random_seed(1)
    module = build_model(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]), {}, 0).eval()
    schema = build_schema(
        types={name: ColumnType(kind="scalar", dtype="float64") for name in "abc"},
        feature_cols=["a", "b", "c"],
        label_cols=None,
        weight_col=None,
    )
    TorchModel(module=module, schema=schema).save(str(folder / "keras"), pickle=True)
    keep(folder, "keras")
    with torch.no_grad():
        return {"keras": module(torch.tensor(ROWS)).tolist()}


PARTS = {"stages": write_stages, "checkpoint": write_checkpoint, "mlflow": write_mlflow, "keras": write_keras}


def main():
    path = HERE / "expected.json"
    for part in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            told = PARTS[part](Path(folder))
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps(known | told, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
