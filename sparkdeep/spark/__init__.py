"""The one door to pyspark.

- `daemon.py`: Spark's Python daemon with torch imported; opt-in
- `doctor/`: looks at a session and says what to change
- `estimator.py`: the name of `TorchEstimator` in files of the first version
- `fit/`: `TorchEstimator`: a fit on Spark, from DataFrame to model
- `ingest/`: DataFrames to persisted shards
- `job/`: whole jobs: configuration in, exit code and result.json out
- `model/`: `TorchModel`: columns in, predictions out; saved, loaded, exported
- `pyfunc.py`: the loader that MLflow models of the first version name
- `session/`: a session: its kind, its slots, its files, its errors
- `tasks/`: what runs in Spark tasks, and what starts them
"""
