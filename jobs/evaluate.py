"""Scores a trained model on the held-out rows of its TOML file.

spark-submit jobs/evaluate.py conf/digits.toml [--set data.path=... ...]

Reads model/ and writes evaluation.json under `[output] dir`. Exit codes in client mode: 0 done, 2 wrong
configuration, 1 failed.
"""

from __future__ import annotations

import sys

from sparkdeep.errors import ConfigError
from sparkdeep.spark.job.run import Job, run_job


def evaluate(job: Job) -> None:
    """Predicts the test rows and prints one line a metric."""
    if not job.config.metrics:
        raise ConfigError('nothing to evaluate: name metrics = ["accuracy"] at the top of the configuration')
    model = job.load_model()
    _, test_rows = job.split()
    # Several aggregates may each run the network; it runs once over rows that are kept.
    predictions = model.transform(test_rows).select(job.label(), job.prediction()).cache()
    for name, value in job.score(predictions).items():
        print(f"{name} {value:.4f}")


if __name__ == "__main__":
    sys.exit(run_job(evaluate, description=__doc__, result_name="evaluation.json"))
