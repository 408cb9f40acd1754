"""The one door to pyspark: nothing outside imports it.

daemon    Spark's Python daemon with torch imported
doctor    what would keep a session from training
fit       `TorchEstimator`
ingest    DataFrames to shards on executors
job       spark-submit jobs
model     `TorchModel`
session   the session: access, slots, jobs, failures
tasks     what runs on executors
"""
