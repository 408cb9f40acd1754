"""What runs on executors, and what starts it there.

barrier         one barrier stage for many rounds
child           a replica in a process of its own
cleaning        a run's folders are removed
replica_tasks   where a replica runs, and the replica that dials the driver
round_jobs      one job for every round
round_tasks     the task of such a job
"""
