"""Every algorithm of the comparison with the rates that were found for it, on a seed that no table has."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from torch.optim import SGD, Adam, AdamW

from sparkdeep import algorithms
from sparkdeep.algorithms import Algorithm

__all__ = ["CONTENDERS", "TUNED", "TUNING_SEED", "Contender", "grid", "settings_of"]

TUNING_SEED: Final = 100
SYNC_EVERY: Final = 10


@final
@dataclass(frozen=True, kw_only=True)
class Contender:
    """An algorithm, and what its rates may be."""

    build: Callable[[float, float], Algorithm]
    """From the replicas' rate and the driver's."""
    inner: Sequence[float]
    """Rates of replicas that are tried; (0,) where they have none."""
    outer: Sequence[float] = (0.0,)
    """Rates of the driver that are tried, or momenta where `what` says so; (0,) where there is none."""
    what: str
    """Of it, in a table."""
    when: str
    """To choose it."""
    replicas: int = 4


def _momentum(rate: float) -> Any:
    return functools.partial(SGD, lr=rate, momentum=0.9)


def _adamw(rate: float) -> Any:
    return functools.partial(AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)


def _averaging(sync_every: int | str) -> Callable[[float, float], Algorithm]:
    return lambda inner, _outer: algorithms.averaging(sync_every).replace(optimizer=_momentum(inner))


def _diloco(inner: float, outer: float) -> Algorithm:
    return algorithms.diloco(lr=outer, sync_every=SYNC_EVERY).replace(optimizer=_adamw(inner))


def _slowmo(inner: float, outer: float) -> Algorithm:
    return algorithms.slowmo(momentum=outer, sync_every=SYNC_EVERY).replace(optimizer=_momentum(inner))


def _bmuf(inner: float, outer: float) -> Algorithm:
    return algorithms.bmuf(momentum=outer, sync_every=SYNC_EVERY).replace(optimizer=_momentum(inner))


def _fed(preset: Callable[..., Algorithm]) -> Callable[[float, float], Algorithm]:
    return lambda inner, outer: preset(lr=outer).replace(
        optimizer=functools.partial(SGD, lr=inner), sync_every=SYNC_EVERY
    )


def _lookahead(inner: float, outer: float) -> Algorithm:
    return algorithms.lookahead(lr=outer).replace(optimizer=_momentum(inner))


def _gradient_adam(_inner: float, outer: float) -> Algorithm:
    changed = {
        "work": "gradient",
        "sync_every": 1,
        "outer_optimizer": functools.partial(Adam, lr=outer),
    }
    return Algorithm("data-parallel Adam", changed, "Kingma and Ba, 2015, Adam: a method for stochastic optimization")


def _lbfgs(_inner: float, _outer: float) -> Algorithm:
    return algorithms.lbfgs(iterations=40).replace(portions=4, validate_every=10)


def _downpour(inner: float, outer: float) -> Algorithm:
    preset = algorithms.downpour(lr=outer, n_fetch=5, n_push=5, warm_start=20)
    return preset.replace(optimizer=functools.partial(SGD, lr=inner))


def _delayed_nesterov(inner: float, outer: float) -> Algorithm:
    preset = algorithms.delayed_nesterov(lr=outer, delay=4, steps=SYNC_EVERY)
    return preset.replace(optimizer=_adamw(inner))


_RATES: Final = (0.02, 0.05, 0.1, 0.2)
_BESIDE_MOMENTUM: Final = (0.01, 0.03, 0.1)
_PLAIN: Final = (0.05, 0.2)
_ADAMW: Final = (3e-3, 1e-2)

CONTENDERS: Final[Mapping[str, Contender]] = {
    "one replica": Contender(
        build=_averaging(50),
        inner=_RATES,
        replicas=1,
        what="SGD with momentum, nobody to average with",
        when="the rows fit one machine and its time suffices",
    ),
    "averaging, every step": Contender(
        build=_averaging(1),
        inner=_RATES,
        what="one batch of all replicas",
        when="the model is small, the network fast, and large-batch SGD is to be matched",
    ),
    "averaging": Contender(
        build=_averaging(SYNC_EVERY),
        inner=_RATES,
        what="the mean after 10 local steps",
        when="in doubt, and first: there is nothing to tune beside the replicas' own rate",
    ),
    "averaging, every epoch": Contender(
        build=_averaging("epoch"),
        inner=_RATES,
        what="FedAvg: the mean after a pass",
        when="bytes count more than passes over the rows",
    ),
    "lookahead": Contender(
        build=_lookahead,
        inner=_RATES,
        outer=(0.5,),
        replicas=1,
        what="one replica that goes part of the way",
        when="there is one machine, and a high rate shakes the model",
    ),
    "slowmo": Contender(
        build=_slowmo,
        inner=_BESIDE_MOMENTUM,
        outer=(0.5,),
        what="momentum on the mean change, in gradients",
        when="the inner rate decays and rounds are long",
    ),
    "bmuf": Contender(
        build=_bmuf,
        inner=_BESIDE_MOMENTUM,
        outer=(0.75,),
        what="momentum on blocks, replicas' state anew",
        when="replicas' optimizer state should not be kept",
    ),
    "diloco": Contender(
        build=_diloco,
        inner=_ADAMW,
        outer=(0.2, 0.4, 0.7),
        what="AdamW inside, Nesterov outside",
        when="rounds are long and many: language models, slow networks",
    ),
    "fedadam": Contender(
        build=_fed(algorithms.fedadam),
        inner=_PLAIN,
        outer=(0.01, 0.03),
        what="Adam outside, plain SGD inside",
        when="replicas should hold no optimizer state",
    ),
    "fedyogi": Contender(
        build=_fed(algorithms.fedyogi),
        inner=_PLAIN,
        outer=(0.01, 0.03),
        what="Yogi outside, plain SGD inside",
        when="fedadam forgets too fast, as where changes are sparse",
    ),
    "fedadagrad": Contender(
        build=_fed(algorithms.fedadagrad),
        inner=_PLAIN,
        outer=(0.03, 0.1),
        what="Adagrad outside, plain SGD inside",
        when="the driver's steps should shrink by themselves",
    ),
    "data-parallel adam": Contender(
        build=_gradient_adam,
        inner=(0.0,),
        outer=(1e-3, 3e-3, 1e-2),
        what="gradients of every step, Adam on the driver",
        when="Adam on the large batch is what must come out, whatever it costs in bytes",
    ),
    "lbfgs": Contender(
        build=_lbfgs,
        inner=(0.0,),
        what="Sandblaster: the gradient of all rows, strong Wolfe",
        when="the problem is convex or small, and wanted to high precision",
    ),
    "downpour": Contender(
        build=_downpour,
        inner=(0.03, 0.1),
        outer=(0.01, 0.03),
        what="pushes taken as they come, by Adagrad",
        when="replicas differ in speed for good",
    ),
    "delayed nesterov": Contender(
        build=_delayed_nesterov,
        inner=_ADAMW,
        outer=(0.2, 0.4),
        what="asynchronous DiLoCo",
        when="replicas differ in speed and bytes are dear",
    ),
}
"""By name, in the order of tables."""

TUNED: Final[Mapping[str, Mapping[str, tuple[float, float]]]] = {
    "digits": {
        "one replica": (0.02, 0.0),
        "averaging, every step": (0.1, 0.0),
        "averaging": (0.05, 0.0),
        "averaging, every epoch": (0.05, 0.0),
        "lookahead": (0.1, 0.5),
        "slowmo": (0.03, 0.5),
        "bmuf": (0.03, 0.75),
        "diloco": (0.01, 0.7),
        "fedadam": (0.2, 0.03),
        "fedyogi": (0.2, 0.03),
        "fedadagrad": (0.2, 0.1),
        "data-parallel adam": (0.0, 1e-2),
        "lbfgs": (0.0, 0.0),
        "downpour": (0.1, 0.03),
        "delayed nesterov": (1e-2, 0.4),
    },
    "mnist10k": {
        "one replica": (0.02, 0.0),
        "averaging, every step": (0.05, 0.0),
        "averaging": (0.05, 0.0),
        "averaging, every epoch": (0.05, 0.0),
        "lookahead": (0.02, 0.5),
        "slowmo": (0.03, 0.5),
        "bmuf": (0.03, 0.75),
        "diloco": (0.01, 0.4),
        "fedadam": (0.2, 0.03),
        "fedyogi": (0.2, 0.03),
        "fedadagrad": (0.2, 0.03),
        "data-parallel adam": (0.0, 0.01),
        "lbfgs": (0.0, 0.0),
        "downpour": (0.1, 0.03),
        "delayed nesterov": (0.01, 0.2),
    },
}
"""The best of the grid, (inner, outer), by data set."""


def grid(contender: Contender) -> list[tuple[float, float]]:
    """All (inner, outer) that are tried."""
    return list(itertools.product(contender.inner, contender.outer))


def settings_of(contender: Contender, rates: tuple[float, float]) -> dict[str, Any]:
    """Arguments of `TorchEstimator`."""
    return {"algorithm": contender.build(*rates), "num_workers": contender.replicas}
