"""The driver's end: open stages by sockets, or a job a round.

- `admission.py`: headers before bodies: nothing is summed until every replica's header was found good
- `arrivals.py`: an asynchronous window at the driver: pushes are applied as they come, none too stale
- `collector.py`: what a run's rounds have in common, one round of them, and what collects its updates: a star, a ring, or as they arrive
- `coordinator.py`: the driver's port: admits this run's replicas and nobody else
- `driver_link.py`: one replica's connection, as the driver sees it
- `gathering.py`: one round at the driver: order, headers, bodies, mean
- `jobs.py`: the driver's end of a job a round
- `opener.py`: when stages open and close
- `ring.py`: the ring at the driver: chosen where it is faster than the star; replicas meet, add up, and each sends its part
- `staffing.py`: who starts replicas, and how many the next stage has
- `stage.py`: the driver's end of one open stage
- `star.py`: the star: every replica is sent the parameters by the driver, which adds their updates up as they arrive
"""
