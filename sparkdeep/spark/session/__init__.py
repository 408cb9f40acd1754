"""A Spark session: its kind, its slots, its files and its errors.

- `access.py`: what differs between classic Spark and Connect
- `failures.py`: errors from executors, read back by name
- `hadoop.py`: files through Spark's Hadoop file systems
- `jobs.py`: a Spark action in a thread, canceled by its tag
- `parcels.py`: how bytes reach replicas through Spark
- `placement.py`: which device a replica computes on
- `preflight.py`: what is checked before anything runs
- `slots.py`: fits take turns on a session's slots
- `task.py`: what a task knows of itself: its host, its folders, its device
- `types.py`: Spark's column types as ours
"""
