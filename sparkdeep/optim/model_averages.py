"""Averages of trained parameters: over a fit's rounds (EMA, SWA), and of several fits (soups)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast, final

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from sparkdeep.checks import at_least, not_negative
from sparkdeep.errors import ConfigError
from sparkdeep.tensors.mean import weighted_mean
from sparkdeep.tensors.parameters import named_tensors, unlike, variances_of
from sparkdeep.tensors.pooling import Pooling
from sparkdeep.tracking.callbacks import Callback, FitInfo
from sparkdeep.tracking.records import RoundRecord

if TYPE_CHECKING:
    from sparkdeep.spark.model.model import TorchModel

__all__ = ["EMA", "SWA", "greedy_soup", "soup"]

_LOG = logging.getLogger("sparkdeep")


class _RoundsAverage(Callback):
    """Keeps one average of the global parameters, in float64: 8 bytes a parameter on the driver.

    It does not touch the fit. It begins anew with every fit, except for one that goes on at the very round where the fit
    before it ended, which resuming in the same process does: give each run an average of its own. A round that is repeated after
    a replica was lost is taken as it was the first time; where clocks decide (time budgets, quorum, asynchronous runs) the
    repetition may differ from it.
    """

    def __init__(self, update: Callable[..., None]) -> None:
        self._update = update
        self._average: dict[str, Tensor] = {}
        self._round = 0
        self.num_averaged = 0
        """Rounds in the average."""

    def on_fit_start(self, info: FitInfo) -> None:
        """Begin anew, or go on."""
        if info.committed and self._round == info.committed:
            return
        if info.committed:
            _LOG.warning(
                "%s begins at round %d, where the fit goes on: what rounds it saw before is not in a checkpoint.",
                type(self).__name__,
                info.committed + 1,
            )
        self._average, self.num_averaged, self._round = {}, 0, info.committed

    def on_round_parameters(self, record: RoundRecord, parameters: Mapping[str, Tensor]) -> None:
        """Take in a round."""
        if record.round <= self._round:  # repeated after a replica was lost: it is in already
            return
        self._round = record.round
        if not self._takes(record.round):
            return
        wide = {name: tensor.detach().to(torch.float64) for name, tensor in parameters.items()}
        if self.num_averaged:
            self._update(list(self._average.values()), [wide[name] for name in self._average], self.num_averaged)
        else:
            self._average = {name: tensor.clone() for name, tensor in wide.items()}
        self.num_averaged += 1

    def _takes(self, round_number: int) -> bool:
        del round_number
        return True

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Copies of the average, by name, float64; empty before the first round."""
        return {name: tensor.clone() for name, tensor in self._average.items()}

    def model(self, model: TorchModel) -> TorchModel:
        """A copy of a trained model with the averaged parameters, rounded once to their dtypes.

        Buffers are those of `model`: a BatchNorm's statistics belong to the last round's parameters (the best round's, with
        early stopping) and not to the average, so that `torch.optim.swa_utils.update_bn(loader, averaged.model)` may be
        wanted.

        Args:
            model: what the fit returned.

        Raises:
            ConfigError: no round was averaged, or the model's parameters are others.
        """
        if not self.num_averaged:
            raise ConfigError(
                f"{self!r} has averaged no round yet: give it to a fit in callbacks=[...], with rounds enough."
            )
        own = {name: tensor for name, tensor in model.model.named_parameters() if name in self._average}
        odd = unlike({name: tensor.to(torch.float64) for name, tensor in own.items()}, self._average)
        if odd:
            raise ConfigError(
                f"the model has other parameters than the fit that was averaged: {str(odd)[:200]}. Give the model which that "
                "fit returned."
            )
        return _with_tensors(model, self._average)


@final
class EMA(_RoundsAverage):
    """The exponential moving average of the global parameters over rounds: a_1 = x_1, a_t = decay a_{t-1} + (1 - decay) x_t.

    `ema = EMA(0.99)`, `model = TorchEstimator(..., callbacks=[ema]).fit(df)`, `ema.model(model)`. The rule is
    `torch.optim.swa_utils.get_ema_multi_avg_fn`'s. A round is many steps: decays are lower than those used for steps.

    Args:
        decay: from 0 to below 1; 0 is the last round.

    Raises:
        ConfigError: `decay` is none.
    """

    def __init__(self, decay: float = 0.999) -> None:
        not_negative("EMA.decay", decay, below=1.0)
        self.decay = decay
        super().__init__(get_ema_multi_avg_fn(decay))

    def __repr__(self) -> str:
        return f"EMA(decay={self.decay!r})"


@final
class SWA(_RoundsAverage):
    """The plain mean of the global parameters after some rounds: stochastic weight averaging (Izmailov et al., 2018).

    The rule is `torch.optim.swa_utils.get_swa_multi_avg_fn`'s. It wants an inner rate that stays high, or goes up and down.

    Args:
        start_round: the first round that is in the mean, from 1; usually at three quarters of them.
        every: rounds from one that is in the mean to the next.

    Raises:
        ConfigError: one is no whole number of at least 1.
    """

    def __init__(self, start_round: int = 1, every: int = 1) -> None:
        at_least("SWA.start_round", start_round, 1)
        at_least("SWA.every", every, 1)
        self.start_round, self.every = start_round, every
        super().__init__(get_swa_multi_avg_fn())

    def __repr__(self) -> str:
        return f"SWA(start_round={self.start_round}, every={self.every})"

    def _takes(self, round_number: int) -> bool:
        return round_number >= self.start_round and (round_number - self.start_round) % self.every == 0


def soup(models: Sequence[TorchModel], weights: Sequence[float] | None = None) -> TorchModel:
    """The average of the parameters of several fits of one network (Wortsman et al., 2022, "Model soups").

    It is of use where they began at the same, well trained parameters (`warm_start`). Means are taken in float64 and
    rounded once; running statistics of BatchNorm are pooled as those of replicas are.

    Args:
        models: of the same parameters and buffers; the result is a copy of the first with the averages.
        weights: one a model, not negative, not all zero; None: alike.

    Raises:
        ConfigError: no model, other parameters, or weights that cannot be meant.
    """
    if not models:
        raise ConfigError("soup was given no models: give at least one TorchModel.")
    shares = [1.0] * len(models) if weights is None else list(weights)
    if len(shares) != len(models):
        raise ConfigError(f"soup: {len(shares)} weights for {len(models)} models; give one each.")
    for i, share in enumerate(shares):
        not_negative(f"soup: weights[{i}]", share)
    if not any(shares):
        raise ConfigError(f"soup: weights={shares!r} are all zero; one must be positive.")
    first = dict(named_tensors(models[0].model))
    for i, model in enumerate(models):
        if odd := unlike(dict(named_tensors(model.model)), first):
            raise ConfigError(
                f"soup: models[{i}] has other parameters or buffers than models[0]: {str(odd)[:200]}. Soups are of one network."
            )
    parameters = [dict(model.model.named_parameters()) for model in models]
    averaged = {
        name: _mean([own[name].detach() for own in parameters], shares)
        for name, tensor in parameters[0].items()
        if tensor.is_floating_point()
    }
    own = [dict(model.model.named_buffers()) for model in models]
    buffers = Pooling(variance_of=variances_of(models[0].model)).pool(own, shares, own[0])
    return _with_tensors(models[0], averaged | buffers)


def greedy_soup(models: Sequence[TorchModel], score: Callable[[TorchModel], float]) -> TorchModel:
    """The greedy soup of Wortsman et al. (2022): from the best model down, each stays in the average if the score does not fall.

    Args:
        models: as for `soup`.
        score: of a model on held-out rows, such as `lambda m: evaluator.evaluate(m.transform(rows))`; higher is better.

    Raises:
        ConfigError: as `soup`.
    """
    soup(models)  # refuses what does not fit before anything is scored
    scores = [score(model) for model in models]
    ranked = sorted(range(len(models)), key=lambda i: (-scores[i], i))
    kept, best = [models[ranked[0]]], scores[ranked[0]]
    for i in ranked[1:]:
        value = score(soup([*kept, models[i]]))
        if value >= best:
            kept, best = [*kept, models[i]], value
    return soup(kept)


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    out = torch.empty(tensors[0].numel(), dtype=torch.float64)
    weighted_mean([tensor.to(torch.float64).reshape(-1) for tensor in tensors], weights, out)
    return out.view(tensors[0].shape)


@torch.no_grad()
def _with_tensors(model: TorchModel, tensors: Mapping[str, Tensor]) -> TorchModel:
    """A copy of `model` of its own memory, with these parameters and buffers."""
    copied = cast("TorchModel", model.copy())
    copied.model, copied.history = copy.deepcopy(model.model), list(model.history)
    own = dict(named_tensors(copied.model))
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return copied
