"""The one door to pyspark.

- `daemon.py`: Spark's Python daemon with torch imported; opt-in
- `doctor/`: looks at a session and says what to change
- `fit/`: `TorchEstimator`: a fit on Spark, from DataFrame to model
- `ingest/`: DataFrames to persisted shards
- `job/`: whole jobs: configuration in, exit code and result.json out
- `model/`: `TorchModel`: columns in, predictions out; saved, loaded, exported
- `session/`: a session: its kind, its slots, its files, its errors
- `tasks/`: what runs in Spark tasks, and what starts them
"""
