"""All that runs where a replica runs: local steps, its end of a stage or job.

- `gradients.py`: a replica's part of a gradient round
- `job.py`: a replica's life in one job: a stage by letter, of which the driver's half was written beforehand
- `link.py`: the replica's end of a connection
- `overlapping.py`: an update that travels while the next round is trained
- `reading.py`: a replica's batches, from its shard to its device, and how far it is in them
- `replica.py`: one replica's local steps
- `ring.py`: replicas that add up their updates among themselves
- `round.py`: the replica's end of a round
- `stage.py`: a replica's life in one stage
- `state.py`: its optimizer and random streams between rounds
- `update.py`: where a replica's round starts, and what it sends of it
- `window.py`: a replica's part of an asynchronous window: pushes and fetches between its steps
"""
