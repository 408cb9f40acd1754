"""Predicts every row of a TOML file's source with its trained model.

spark-submit jobs/predict.py conf/digits.toml [--set data.path=... ...]

Reads model/, writes the rows with their predictions to scored/ (Parquet) and prediction.json under `[output] dir`.
Exit codes in client mode: 0 done, 2 wrong configuration, 1 failed.
"""

from __future__ import annotations

import sys

from sparkdeep.spark.job.run import Job, run_job


def predict(job: Job) -> None:
    """Writes the source's rows with one more column."""
    model = job.load_model()
    target = job.output_uri("scored")
    model.transform(job.rows()).write.mode("overwrite").parquet(target)
    job.result["predictions"] = target
    print(f"predictions {target}")


if __name__ == "__main__":
    sys.exit(run_job(predict, description=__doc__, result_name="prediction.json"))
