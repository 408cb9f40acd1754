"""Arrow columns to shards to batches, without Spark; `data/petastorm`.

- `arrow.py`: Arrow columns to numpy, by whole columns
- `batches.py`: fields to the tensors that a model is given
- `columns.py`: Arrow batches to fields
- `decoding.py`: binary columns through the user's `decode`
- `faults.py`: nulls and NaNs, counted over all rows for one message
- `feed.py`: the rows of an epoch's batches, read ahead from disk
- `order.py`: which rows make which batch: pure functions
- `petastorm/`: petastorm's datasets, read without petastorm or through it
- `portions.py`: a portion of the rows as bytes, and back as files
- `prefetch.py`: items made by a thread before they are asked for
- `sample.py`: a few rows as bytes, for the driver
- `schema.py`: column settings checked against the DataFrame's types
- `scratch.py`: where shards live, and cleaning up after killed executors
- `shard_maps.py`: a shard's column files, checked before they are mapped
- `shards.py`: one partition's rows as memory-mapped column files
"""
