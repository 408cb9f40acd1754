"""DataFrames to persisted shards: dealt by row, by key or by portion, dealt again, and read from petastorm.

- `dealing_by_key.py`: rows dealt by a column: all rows of a key to one replica
- `ingest.py`: DataFrame to shards
- `petastorm_native.py`: datasets of petastorm as DataFrames
- `petastorm_source.py`: what petastorm reads, dealt to replicas
- `tasks.py`: executor side: a partition's rows as a shard or a portion, shards dealt again
"""
