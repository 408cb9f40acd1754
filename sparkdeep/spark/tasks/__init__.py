"""What runs in Spark tasks, and what starts them.

- `barrier.py`: starts and cancels barrier stages
- `child.py`: a replica in a process of its own, for GPUs
- `cleaning.py`: removes a run's folders after a fit
- `replica_tasks.py`: executor side of a stage: one replica
- `round_jobs.py`: the driver's side of transport="spark": a job a round
- `round_tasks.py`: executor side of a job a round
"""
