"""The same rounds by optax and Flower; run with a Python that has them: prints the results as JSON. No torch, no Spark."""

from __future__ import annotations

import json
import sys

import flwr.server.strategy as flower
import jax
import numpy as np
import optax
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy.aggregate import aggregate_median, aggregate_trimmed_avg

jax.config.update("jax_enable_x64", True)


def changes(given, x, target):
    """A round's mean is part of the way to the target."""
    return given["share"] * (target - x)


def by_optax(given, optimizer):
    x = np.array(given["start"])
    state = optimizer.init(x)
    for target in np.array(given["targets"]):
        updates, state = optimizer.update(-changes(given, x, target), state, x)
        x = np.asarray(optax.apply_updates(x, updates))
    return x.tolist()


def lookahead(given):
    """Fast steps towards one target after the other; every third they are taken half back."""
    optimizer = optax.lookahead(optax.sgd(given["share"]), sync_period=3, slow_step_size=0.5)
    parameters = optax.LookaheadParams.init_synced(np.array(given["start"]))
    state = optimizer.init(parameters)
    for target in np.array(given["targets"]):
        updates, state = optimizer.update(parameters.fast - target, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    return np.asarray(parameters.slow).tolist()


def by_flower(given, cls, **options):
    x = np.array(given["start"])
    strategy = cls(initial_parameters=ndarrays_to_parameters([x]), **options)
    ok = Status(code=Code.OK, message="")
    for number, target in enumerate(np.array(given["targets"]), 1):
        mean = x + changes(given, x, target)
        spread = np.array(given["spread"])
        rows = given["rows"]
        results = [
            (None, FitRes(ok, ndarrays_to_parameters([mean + s]), n, {})) for s, n in zip(spread, rows, strict=True)
        ]
        x = parameters_to_ndarrays(strategy.aggregate_fit(number, results, [])[0])[0]
    return x.tolist()


def main():
    given = json.load(sys.stdin)
    vectors = [([np.array(v)], 1) for v in given["vectors"]]
    found = {
        "nesterov": by_optax(given, optax.sgd(0.7, momentum=0.9, nesterov=True)),
        "momentum": by_optax(given, optax.sgd(1.0, momentum=0.8)),
        "lookahead": lookahead(given),
        "fedavg": by_flower(given, flower.FedAvg),
        "fedyogi": by_flower(given, flower.FedYogi, eta=0.05, beta_1=0.9, beta_2=0.99, tau=1e-6),
        "fedadagrad": by_flower(given, flower.FedAdagrad, eta=0.05, tau=1e-6),
        "median": aggregate_median(vectors)[0].tolist(),
        "trimmed": aggregate_trimmed_avg(vectors, 0.2)[0].tolist(),
    }
    print(json.dumps(found))


main()
