"""An ETL pipeline in six steps: extract, features, train, evaluate against a gate, score, publish.

spark-submit jobs/pipeline.py conf/pipeline.toml [--step NAME] [--again] [--set data.path=... ...]

Each step reads what the steps before it wrote under `[output] dir` and leaves a marker there. A step that is done is
not done again while its settings are the same (rows that changed behind the same path are not noticed: --again), so the
same command goes on after a failure; training goes on from its newest checkpoint. Exit codes in client mode: 0 done,
2 wrong configuration or a step out of order, 1 failed or the gate is not passed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sparkdeep.errors import ConfigError, SparkdeepError
from sparkdeep.spark.job.result import write_result
from sparkdeep.spark.job.run import Job, run_job, spark_uri
from sparkdeep.spark.job.steps import Step, Steps
from sparkdeep.storage.opening import open_store

HIGHER_IS_BETTER = frozenset({"accuracy"})


class Work:
    """What the steps do; they pass rows and models to each other through the output folder only."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def read(self, name: str) -> Any:
        """The rows that a step wrote."""
        return self.job.session().read.parquet(self.job.output_uri(name))

    def write(self, rows: Any, name: str) -> int:
        """Write rows in place of what an earlier attempt left; returns how many they are."""
        rows.write.mode("overwrite").parquet(self.job.output_uri(name))
        return int(self.read(name).count())

    def featured(self, rows: Any) -> Any:
        """Rows with the feature columns."""
        from pyspark.ml import PipelineModel

        if self.job.config.pipeline.features is None:
            return rows
        self.job.session()
        return PipelineModel.load(self.job.output_uri("features")).transform(rows)

    def extract(self) -> dict[str, Any]:
        """Read the source once, split it, keep both parts."""
        train, test = self.job.split()
        return {"train": self.write(train, "extracted/train"), "test": self.write(test, "extracted/test")}

    def features(self) -> dict[str, Any]:
        """Fit the feature stages on the training rows."""
        pipeline = self.job.feature_pipeline()
        if pipeline is None:
            return {"stages": 0}
        fitted = pipeline.fit(self.read("extracted/train"))
        fitted.write().overwrite().save(self.job.output_uri("features"))
        return {"stages": len(fitted.stages)}

    def train(self) -> dict[str, Any]:
        """Train; after a failure go on from the newest checkpoint."""
        estimator = self.job.estimator()
        if estimator.getCheckpointDir() is None:
            estimator.setCheckpointDir(self.job.output("checkpoints"))
        if self.job.options.again:
            estimator.setResume(False)
        model = estimator.fit(self.featured(self.read("extracted/train")))
        self.job.records[:] = model.history
        model.write().overwrite().save(self.job.output("model"))
        return {"rounds": len(model.history), "loss": model.history[-1].loss if model.history else None}

    def evaluate(self) -> dict[str, Any]:
        """Score the test rows, and hold the scores to the gate."""
        rows = self.job.load_model().transform(self.featured(self.read("extracted/test")))
        self.write(rows.select(self.job.label(), self.job.prediction()), "predictions")
        scores = self.job.score(self.read("predictions"))
        for metric, bound in self.job.config.pipeline.gate.items():
            if metric not in scores:
                raise ConfigError(
                    f"[pipeline] gate names {metric!r}, which metrics = {list(scores)} does not: add it there"
                )
            better = scores[metric] >= bound if metric in HIGHER_IS_BETTER else scores[metric] <= bound
            if not better:
                rule = "at least" if metric in HIGHER_IS_BETTER else "at most"
                raise SparkdeepError(
                    f"the gate is not passed: {metric} is {scores[metric]:.6g} on the test rows, and must be {rule} {bound:g}. "
                    "Nothing is published; train better, or change [pipeline] gate."
                )
        return dict(scores)

    def score(self) -> dict[str, Any]:
        """Predict the rows to score."""
        rows = self.job.rows_to_score()
        rows = self.read("extracted/test") if rows is None else rows
        return {"rows": self.write(self.job.load_model().transform(self.featured(rows)), "scores")}

    def publish(self, version: str, scores: Mapping[str, Any]) -> dict[str, Any]:
        """Save feature stages and network as one PipelineModel under its version, then point latest.json at it."""
        from pyspark.ml import PipelineModel

        folder = self.job.config.pipeline.publish or self.job.output("published")
        model = self.job.load_model()
        stages = (
            []
            if self.job.config.pipeline.features is None
            else PipelineModel.load(self.job.output_uri("features")).stages
        )
        PipelineModel(stages=[*stages, model]).write().overwrite().save(spark_uri(f"{folder.rstrip('/')}/{version}"))
        # Last: who reads latest.json finds a whole model behind it, or the one before.
        write_result(folder, "latest.json", {"version": version, "scores": scores}, fallback=self.job.hadoop_store)
        return {"version": version, "folder": folder}


def steps_of(job: Job) -> Steps:
    """The six steps, with the settings that each depends on."""
    work, config = Work(job), job.config
    pipeline = config.pipeline
    parts = (config.model, config.loss, config.optimizer, config.lr_scheduler, config.outer_optimizer)
    trained = [None if part is None else asdict(part) for part in parts]
    features = None if pipeline.features is None else asdict(pipeline.features)
    train = Step(name="train", work=work.train, needs=("features",), settings=[*trained, config.fit])
    gate = [list(config.metrics), pipeline.gate]
    store = open_store(config.output.dir, fallback=job.hadoop_store)
    before = [
        Step(name="extract", work=work.extract, settings=asdict(config.data)),
        Step(name="features", work=work.features, needs=("extract",), settings=features),
        train,
        Step(name="evaluate", work=work.evaluate, needs=("train",), settings=gate),
        Step(name="score", work=work.score, needs=("evaluate",), settings=pipeline.score),
    ]
    steps = Steps(before, store)
    version = steps.fingerprint("evaluate")
    publish = Step(
        name="publish",
        work=lambda: work.publish(version, steps.result("evaluate") or {}),
        needs=("evaluate",),
        settings=pipeline.publish,
    )
    return Steps([*before, publish], store)


def pipeline(job: Job) -> None:
    """Run the steps asked for, or all, and say of each what it did."""
    steps = steps_of(job)
    for name in [job.options.step] if job.options.step else steps.names:
        report = steps.run(name, again=job.options.again)
        job.result.setdefault("steps", {})[name] = dict(report.result)
        told = "done before" if report.done_before else f"{report.seconds:.1f} s"
        print(
            f"step {name}: {told}: " + ", ".join(f"{key} {value}" for key, value in report.result.items()), flush=True
        )
    job.result.update(steps.result("evaluate") or {})


def options(parser: argparse.ArgumentParser) -> None:
    """This job's own options."""
    names = ("extract", "features", "train", "evaluate", "score", "publish")
    parser.add_argument("--step", choices=names, help="only this one; default: all that are not done")
    parser.add_argument("--again", action="store_true", help="also what is done")


if __name__ == "__main__":
    sys.exit(run_job(pipeline, description=__doc__, result_name="pipeline.json", options=options))
