"""The run on the driver: what is due, what it starts from, when it is over.

- `downlink.py`: what replicas know of the global parameters
- `fit.py`: one fit, from shards to parameters, without Spark
- `fit_checks.py`: whether the user's optimizer can do what the settings ask of it
- `generation.py`: one dealing of the rows, and its rounds
- `guards.py`: failures, deadlines and divergence: when to repeat a round, and when to give up
- `identity.py`: what makes a run the run that it is, for resuming
- `inner_rates.py`: the replicas' learning rate, as the driver needs it
- `loop.py`: the main loop
- `round.py`: one round and its outer step: planned, trained, committed in the driver's memory, and put on record
- `run.py`: what the loop works on
- `run_state.py`: everything the next round depends on, as one value
- `transport.py`: what the main loop needs of a transport, and the snapshots that it goes back to
"""
