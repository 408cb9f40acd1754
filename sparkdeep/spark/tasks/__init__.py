"""What runs in Spark tasks, and what starts them.

- `child.py`: a replica in a process of its own, for GPUs
- `cleaning.py`: removes a run's folders after a fit
- `replica_tasks.py`: barrier stages of replicas: the launcher, and executor side of one replica
- `round_jobs.py`: the driver's side of transport="spark": a job a round
- `round_tasks.py`: executor side of a job a round
"""
