"""Trains a network by a TOML file, scores it on held-out rows, and keeps everything in one folder.

spark-submit jobs/train.py conf/digits.toml [--set fit.epochs=3 ...]

Writes model/, predictions/ (label and prediction of the test rows, Parquet), rounds.jsonl, result.json and report.html
under `[output] dir`. Exit codes in client mode: 0 done, 2 wrong configuration, 1 failed.
"""

from __future__ import annotations

import sys

from sparkdeep.spark.job.run import Job, run_job


def train(job: Job) -> None:
    """Fits, saves, predicts the test rows, and prints one line a metric."""
    estimator = job.estimator()
    train_rows, test_rows = job.split()
    model = estimator.fit(train_rows)
    job.records[:] = model.history
    model.write().overwrite().save(job.output_uri("model"))

    predictions = model.transform(test_rows).select(job.label(), job.prediction())
    predictions.write.mode("overwrite").parquet(job.output_uri("predictions"))
    # Read back, so that the network runs once and the scores are those of the rows on disk.
    written = job.session().read.parquet(job.output_uri("predictions"))
    for name, value in job.score(written).items():
        print(f"{name} {value:.4f}")


if __name__ == "__main__":
    sys.exit(run_job(train, description=__doc__, result_name="result.json"))
