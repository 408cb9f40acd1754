"""DataFrames to persisted shards: dealt by row, by key or by portion, dealt again, and read from petastorm.

- `dealing_by_key.py`: rows dealt by a column: all rows of a key to one replica
- `ingest.py`: DataFrame to shards
- `petastorm_native.py`: datasets of petastorm as DataFrames
- `petastorm_source.py`: what petastorm reads, dealt to replicas
- `portions.py`: executor side of portions: a partition's rows as one portion
- `redealing.py`: shards on shared storage, dealt to another number of replicas
- `tasks.py`: executor side of ingest: a partition's rows as one shard
"""
