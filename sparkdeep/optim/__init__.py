"""The algebra of a round: its length, how updates become one, the outer step.

- `aggregators.py`: how a round's updates become one
- `asynchronous.py`: how often replicas fetch and push on their own, whose turn it is, and a step for each push
- `averaging.py`: the mean of a round, from bodies as they arrive or from memory
- `drift.py`: corrections of client drift, and what they add to a replica's gradient
- `gradient_rounds.py`: the outer step on gradients: any torch optimizer, L-BFGS an iteration a round
- `local_work.py`: rules for the length of rounds
- `model_averages.py`: EMA and SWA over a fit's rounds, soups of several fits
- `outer.py`: the driver's step: assign the mean, or any torch optimizer, with FedAdam, FedYogi, SlowMo, delayed Nesterov, Downpour
- `schedule.py`: how epochs divide into rounds
"""
