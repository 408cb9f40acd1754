"""The published algorithms by name: each is a set of settings of the one loop, to print, to change and to give to a fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Final, final

from torch.optim import LBFGS, SGD, Adagrad, AdamW

from sparkdeep.checks import refuse_unknown
from sparkdeep.errors import ConfigError
from sparkdeep.optim.asynchronous import Asynchronous
from sparkdeep.optim.local_work import WarmStart
from sparkdeep.optim.outer import DelayedNesterov, Downpour, FedAdam, FedYogi, SlowMo
from sparkdeep.settings.run import LocalSettings, RunSettings

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "averaging",
    "bmuf",
    "delayed_nesterov",
    "diloco",
    "downpour",
    "fedadagrad",
    "fedadam",
    "fedyogi",
    "lbfgs",
    "lookahead",
    "preset_of",
    "slowmo",
]


@final
@dataclass(frozen=True, repr=False)
class Algorithm:
    """Settings under the name of the paper that has them; what the caller sets in a fit wins over them.

    `print(diloco())` shows them, `diloco().replace(sync_every=30)` gives others, and `TorchEstimator(algorithm=diloco(), ...)`
    trains with them.
    """

    name: str
    """Of the method."""
    settings: Mapping[str, Any]
    """Arguments of `TorchEstimator` by name."""
    source: str = ""
    """The paper."""

    def __post_init__(self) -> None:
        known = [f.name for cls in (LocalSettings, RunSettings) for f in fields(cls)]
        refuse_unknown(
            self.settings,
            [*known, "optimizer", "lr_scheduler", "outer_optimizer"],
            f"setting of the algorithm {self.name!r}:",
        )
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    def replace(self, **changes: Any) -> Algorithm:
        """The same with other settings.

        Raises:
            ConfigError: a name that is no setting ("did you mean").
        """
        return Algorithm(self.name, {**self.settings, **changes}, self.source)

    def __reduce__(self) -> Any:
        return Algorithm, (self.name, dict(self.settings), self.source)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Algorithm) and repr(other) == repr(self)

    def __hash__(self) -> int:
        return hash((self.name, self.source))

    def __repr__(self) -> str:
        return _call(self.name, (), self.settings)


def _call(name: str, values: Iterable[Any], named: Mapping[str, Any]) -> str:
    arguments = [*map(_shown, values), *(f"{key}={_shown(value)}" for key, value in named.items())]
    return f"{name}({', '.join(arguments)})"


def _shown(value: Any) -> str:
    if isinstance(value, functools.partial):
        return _call(_shown(value.func), value.args, value.keywords)
    return value.__name__ if isinstance(value, type) or hasattr(value, "__code__") else repr(value)


def averaging(sync_every: int | str = 10) -> Algorithm:
    """Parameter averaging: the mean itself, by rows."""
    return Algorithm(
        "averaging",
        {"outer_optimizer": None, "sync_every": sync_every, "inner_state": "keep"},
        "McMahan et al., 2017, Communication-efficient learning of deep networks from decentralized data",
    )


def diloco(lr: float = 0.7, momentum: float = 0.9, sync_every: int = 500) -> Algorithm:
    """DiLoCo: AdamW inside, Nesterov outside.

    Args:
        lr: of the outer step. For rounds of 30 steps, 0.4 with one replica, 0.6 with two or four, 0.8 with eight (Charles et al.,
            2025, "Communication-efficient language model training scales reliably and robustly").
        momentum: of the outer step.
        sync_every: local steps of a round.
    """
    return Algorithm(
        "diloco",
        {
            "optimizer": functools.partial(AdamW, lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1),
            "outer_optimizer": functools.partial(SGD, lr=lr, momentum=momentum, nesterov=True),
            "sync_every": sync_every,
            "inner_state": "keep",
        },
        "Douillard et al., 2023, DiLoCo: distributed low-communication training of language models",
    )


def slowmo(lr: float = 1.0, momentum: float = 0.5, sync_every: int = 48) -> Algorithm:
    """SlowMo: slow momentum, in units of gradients, so that it is right when the inner rate decays."""
    return Algorithm(
        "slowmo",
        {
            "outer_optimizer": functools.partial(SlowMo, lr=lr, momentum=momentum),
            "sync_every": sync_every,
            "inner_state": "keep",
        },
        "Wang et al., 2020, SlowMo: improving communication-efficient distributed SGD with slow momentum",
    )


def bmuf(momentum: float = 0.875, lr: float = 1.0, nesterov: bool = True, sync_every: int = 50) -> Algorithm:
    """Blockwise model-update filtering.

    Args:
        momentum: of blocks; 1 - 1/num_workers, here for 8.
        lr: of blocks.
        nesterov: whether replicas start from the look-ahead.
        sync_every: local steps of a block.
    """
    return Algorithm(
        "bmuf",
        {
            "outer_optimizer": functools.partial(SGD, lr=lr, momentum=momentum, nesterov=nesterov),
            "sync_every": sync_every,
            "inner_state": "reset",
        },
        "Chen and Huo, 2016, Scalable training of deep learning machines by incremental block training",
    )


def _fedopt(name: str, outer: Callable[..., Any]) -> Algorithm:
    return Algorithm(
        name,
        {"outer_optimizer": outer, "sync_every": "epoch", "inner_state": "reset"},
        "Reddi et al., 2021, Adaptive federated optimization",
    )


def fedadam(lr: float = 0.1, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3) -> Algorithm:
    """FedAdam: Adam without bias correction outside, an epoch of SGD inside."""
    return _fedopt("fedadam", functools.partial(FedAdam, lr=lr, betas=betas, tau=tau))


def fedadagrad(lr: float = 0.1, tau: float = 1e-3) -> Algorithm:
    """FedAdagrad: Adagrad outside, an epoch of SGD inside."""
    return _fedopt("fedadagrad", functools.partial(Adagrad, lr=lr, initial_accumulator_value=tau**2, eps=tau))


def fedyogi(lr: float = 0.1, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3) -> Algorithm:
    """FedYogi: Yogi outside, an epoch of SGD inside."""
    return _fedopt("fedyogi", functools.partial(FedYogi, lr=lr, betas=betas, tau=tau))


def lookahead(lr: float = 0.5, sync_every: int = 5) -> Algorithm:
    """Lookahead: half the way that the fast weights went; the paper's with `num_workers=1`."""
    return Algorithm(
        "lookahead",
        {"outer_optimizer": functools.partial(SGD, lr=lr), "sync_every": sync_every, "inner_state": "keep"},
        "Zhang et al., 2019, Lookahead optimizer: k steps forward, 1 step back",
    )


def delayed_nesterov(lr: float = 0.7, momentum: float = 0.9, delay: int = 4, steps: int = 50) -> Algorithm:
    """Asynchronous local SGD: each replica's change is taken when it comes, momentum every `delay` of them.

    Args:
        lr: of the outer step.
        momentum: of the outer step.
        delay: pushes between steps of the momentum, as many as there are replicas.
        steps: local steps between fetches and pushes.
    """
    return Algorithm(
        "delayed_nesterov",
        {
            "optimizer": functools.partial(AdamW, lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1),
            "outer_optimizer": functools.partial(DelayedNesterov, lr=lr, momentum=momentum, delay=delay),
            "asynchronous": Asynchronous(n_fetch=steps, n_push=steps),
            "sync_every": "epoch",
            "inner_state": "keep",
        },
        "Liu et al., 2024, Asynchronous local-SGD training for language modeling",
    )


def lbfgs(
    history_size: int = 10, iterations: int = 100, tolerance_grad: float = 1e-7, tolerance_change: float = 1e-12
) -> Algorithm:
    """Sandblaster L-BFGS: every gradient is one of all rows, taken in many portions by ordinary tasks.

    Args:
        history_size: pairs that the Hessian is approximated from.
        iterations: at most; a round is one.
        tolerance_grad: the largest component of a gradient at which the run is over.
        tolerance_change: of the loss and of every parameter from round to round, at which it is over too. torch's own 1e-9 ends
            where the fifth digit of the parameters still moves.
    """
    return Algorithm(
        "lbfgs",
        {
            "outer_optimizer": functools.partial(
                LBFGS,
                history_size=history_size,
                tolerance_grad=tolerance_grad,
                tolerance_change=tolerance_change,
                line_search_fn="strong_wolfe",
            ),
            "work": "gradient",
            "portions": "auto",
            "sync_every": "epoch",
            "epochs": iterations,
        },
        "Dean et al., 2012, Large scale distributed deep networks",
    )


def downpour(lr: float = 0.1, n_fetch: int = 1, n_push: int = 1, warm_start: int = 100) -> Algorithm:
    """Downpour SGD: replicas fetch and push on their own, and the driver's Adagrad takes each push when it comes.

    Args:
        lr: of Adagrad, some ten times that of SGD.
        n_fetch: local steps between fetches.
        n_push: local steps between pushes.
        warm_start: local steps that the first replica takes alone; 0 for none.
    """
    return Algorithm(
        "downpour",
        {
            "optimizer": functools.partial(SGD, lr=0.01),
            "outer_optimizer": functools.partial(Downpour, lr=lr),
            "asynchronous": Asynchronous(n_fetch=n_fetch, n_push=n_push),
            "schedule": WarmStart(warm_start) if warm_start else None,
            "sync_every": "epoch",
            "inner_state": "keep",
        },
        "Dean et al., 2012, Large scale distributed deep networks",
    )


ALGORITHMS: Final[Mapping[str, Callable[..., Algorithm]]] = MappingProxyType(
    {
        preset.__name__: preset
        for preset in (
            averaging,
            bmuf,
            delayed_nesterov,
            diloco,
            downpour,
            fedadagrad,
            fedadam,
            fedyogi,
            lbfgs,
            lookahead,
            slowmo,
        )
    }
)
"""Every preset by its name."""


def preset_of(algorithm: Algorithm | str | None) -> Mapping[str, Any]:
    """The settings of a preset, or of the one that has a name.

    Raises:
        ConfigError: there is none of that name, or it is no preset.
    """
    if algorithm is None:
        return {}
    if isinstance(algorithm, str):
        refuse_unknown([algorithm], ALGORITHMS, "algorithm")
        algorithm = ALGORITHMS[algorithm]()
    if not isinstance(algorithm, Algorithm):
        hint = f" Call it: {algorithm.__name__}()." if algorithm in ALGORITHMS.values() else ""
        raise ConfigError(f"algorithm={algorithm!r}: must be a preset such as diloco(), or its name.{hint}")
    return algorithm.settings
