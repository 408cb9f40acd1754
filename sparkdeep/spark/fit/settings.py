"""The settings of one fit as a frozen value, checked together; made from an estimator's params at the start of a fit."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Final

import cloudpickle

from sparkdeep.data.schema import ColumnNames, names_in
from sparkdeep.errors import ConfigError
from sparkdeep.models.building import may_bring_loss, may_bring_optimizer
from sparkdeep.models.prediction import check_choice
from sparkdeep.rounds.fit_checks import check_factory
from sparkdeep.rounds.identity import describe
from sparkdeep.settings.contradictions import check_outer, check_together
from sparkdeep.settings.run import EarlyStopping, LocalSettings, RunSettings
from sparkdeep.stages.coordinator import parse_ports
from sparkdeep.storage.own_names import SAID_LATER, with_first_modules
from sparkdeep.storage.store import shown_uri
from sparkdeep.tracking.callbacks import Callback
from sparkdeep.tracking.records import RoundRecord

__all__ = ["FitSettings", "described", "digest_of"]

_LOG = logging.getLogger("sparkdeep")
_LOCAL = frozenset(f.name for f in fields(LocalSettings))
_RUN = frozenset(f.name for f in fields(RunSettings))

# What may change when a run is resumed: where and how it runs, and who watches.
_PASSING: Final = frozenset(
    {"callbacks", "checkpoint_dir", "checkpoint_every", "coordinator_host", "coordinator_port", "cpus_per_worker"}
    | {"device", "exchange_dir", "gpus_per_worker", "keep_checkpoints", "max_retries", "max_stage_s", "open_timeout_s"}
    | {"prediction", "prediction_col", "probability_col", "progress", "raw_prediction_col", "replica_state", "resume"}
    | {
        "divergence_factor",
        "encrypted_disks",
        "min_round_timeout_s",
        "min_workers",
        "on_checkpoint_error",
        "overlap_fragments",
        "plain_ring",
        "quorum",
        "quorum_grace_s",
        "replacement_timeout_s",
        "replay",
        "retry_backoff_s",
        "rounds_per_stage",
        "search",
        "shard_dir",
        "stall_timeout_s",
        "tls",
        "transport",
        "worker_process",
    }
)


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """What `TorchEstimator` was given; each field is described there."""

    local: LocalSettings
    run: RunSettings
    model: Any
    feature_cols: ColumnNames
    optimizer: Callable[..., Any] | None = None
    label_cols: ColumnNames | None = None
    loss: Callable[..., Any] | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    lr_scheduler: Callable[..., Any] | None = None
    outer_optimizer: Callable[..., Any] | None = None
    weight_col: str | None = None
    validation: Any = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    training_step: Callable[..., Any] | None = None
    preprocess: Callable[[Any], Any] | None = None
    augment: Callable[[Any], Any] | None = None
    decode: Any = None
    collate: Any = None
    buffers: Mapping[str, Any] = field(default_factory=dict)
    prediction: Any = None
    prediction_col: str = "prediction"
    probability_col: str | None = None
    raw_prediction_col: str | None = None
    checkpoint_dir: str | None = None
    resume: str | bool = "auto"
    keep_checkpoints: int = 3
    replay: Sequence[RoundRecord] = ()
    callbacks: Sequence[Callable[..., Any]] = ()
    cpus_per_worker: int | None = None
    gpus_per_worker: int | None = None
    coordinator_host: str | None = None
    coordinator_port: int | tuple[int, int] | str | None = None
    tls: bool | str = "auto"
    encrypted_disks: bool = False
    deal: str = "rows"
    deal_key: str | None = None
    shard_dir: str | None = None
    transport: str = "auto"
    exchange_dir: str | None = None
    worker_process: str = "auto"
    progress: bool = True
    search: bool = False
    """Whether this fit is one of several of the same estimator, which must not share their checkpoints."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> FitSettings:
        """Make the settings from every param's value by name.

        Raises:
            ConfigError: a value, or two together, cannot be meant.
        """
        given = dict(values)
        rule = given.pop("early_stopping", None)
        if rule is not None and not isinstance(rule, EarlyStopping):
            rule = EarlyStopping(patience=rule)
        rate = given.pop("learning_rate", None)
        local = LocalSettings(**{name: given.pop(name) for name in list(given) if name in _LOCAL})
        run = RunSettings(early_stopping=rule, **{name: given.pop(name) for name in list(given) if name in _RUN})
        for name in ("model_args", "metrics", "buffers"):
            given[name] = dict(given.get(name) or {})
        given["callbacks"] = list(given.get("callbacks") or ())
        given["replay"] = list(given.get("replay") or ())
        if isinstance(given.get("coordinator_port"), list):
            given["coordinator_port"] = tuple(given["coordinator_port"])
        if rate is not None:
            given["optimizer"] = _at_rate(given.get("optimizer"), rate, gradient=run.work == "gradient")
        return cls(local=local, run=run, **given)

    def __post_init__(self) -> None:
        for name in ("optimizer", "lr_scheduler", "outer_optimizer", "loss", "training_step", "preprocess", "augment"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ConfigError(f"{name}={value!r}: must be callable, such as partial(torch.optim.SGD, lr=0.1).")
        check_factory(self.outer_optimizer, self.run)
        if self.run.work == "gradient" and self.optimizer is not None:
            _LOG.warning(
                "optimizer= with work='gradient' is not used: replicas take no steps, and outer_optimizer= moves the parameters."
            )
        if self.optimizer is None and self.run.work == "local" and not may_bring_optimizer(self.model):
            raise ConfigError("give optimizer=, such as partial(torch.optim.SGD, lr=0.1).")
        if self.loss is None and self.training_step is None and not may_bring_loss(self.model):
            raise ConfigError("give loss=, such as nn.CrossEntropyLoss(), or training_step=.")
        if self.loss is not None and self.training_step is None and self.label_cols is None:
            raise ConfigError("give label_cols=, or training_step= for a loss that needs no label.")
        if (self.metrics or self.run.early_stopping) and self.validation is None:
            raise ConfigError(
                "metrics= and early_stopping= are scored on validation rows: give validation=0.1, for one."
            )
        rule = self.run.early_stopping
        if rule is not None and rule.monitor not in {"loss", *self.metrics}:
            raise ConfigError(f"early_stopping monitors {rule.monitor!r}; known: {['loss', *self.metrics]}.")
        check_together(self.local, self.run)
        check_outer(self.run, self.outer_optimizer)
        if self.resume not in ("auto", True, False):
            raise ConfigError(f"resume={self.resume!r}: must be 'auto' or False.")
        if self.tls not in ("auto", True, False):
            raise ConfigError(f"tls={self.tls!r}: must be 'auto', True or False.")
        if not isinstance(self.encrypted_disks, bool):
            raise ConfigError(f"encrypted_disks={self.encrypted_disks!r}: must be True or False.")
        self._check_dealing()
        if self.transport not in ("auto", "socket", "spark"):
            raise ConfigError(f"transport={self.transport!r}: must be 'auto', 'socket' or 'spark'.")
        if self.exchange_dir is not None and not re.match(r"/|[A-Za-z][A-Za-z0-9+.\-]*:", str(self.exchange_dir)):
            raise ConfigError(
                f"exchange_dir={self.exchange_dir!r}: give an absolute path or a URI, as executors have another current folder."
            )
        if self.worker_process not in ("auto", "spawn", "reuse"):
            raise ConfigError(f"worker_process={self.worker_process!r}: must be 'auto', 'spawn' or 'reuse'.")
        if odd := [one for one in self.replay if not isinstance(one, RoundRecord)]:
            raise ConfigError(f"replay holds a {type(odd[0]).__name__}: give a model's history, or read_jsonl(path).")
        for one in self.callbacks:
            is_class = isinstance(one, type) and issubclass(one, Callback)
            if is_class or not (callable(one) or isinstance(one, Callback)):
                raise ConfigError(
                    f"callbacks hold {one!r}: give functions of a round's record, or Callback objects"
                    f"{f', {one.__name__}(...)' if is_class else ''}."
                )
        self._check_columns()
        vectors = [part for part in ("probability", "raw_prediction") if getattr(self, f"{part}_col") is not None]
        check_choice(self.prediction, vectors)
        parse_ports(self.coordinator_port)

    def _check_dealing(self) -> None:
        if self.deal not in ("rows", "partitions"):
            raise ConfigError(f"deal={self.deal!r}: must be 'rows' or 'partitions'.")
        if self.deal == "partitions" and self.run.min_workers is not None:
            raise ConfigError(
                f"deal='partitions' with min_workers={self.run.min_workers}: a partition stays with its replica, and rows cannot be "
                "dealt to fewer. Use deal='rows'."
            )
        if self.deal_key is None:
            return
        if not isinstance(self.deal_key, str) or not self.deal_key:
            raise ConfigError(f"deal_key={self.deal_key!r}: must be a column's name.")
        if self.deal == "partitions":
            raise ConfigError(
                f"deal_key={self.deal_key!r} with deal='partitions', as petastorm datasets are dealt: each partition stays as it "
                "is. Leave one out."
            )
        if self.run.min_workers is not None:
            raise ConfigError(
                f"deal_key={self.deal_key!r} with min_workers={self.run.min_workers}: keys stay with their replicas, and rows cannot "
                "be dealt to fewer. Leave one out."
            )

    def _check_columns(self) -> None:
        used = names_in(self.feature_cols) + names_in(self.label_cols) + names_in(self.weight_col)
        written: list[str] = []
        for setting in ("prediction_col", "probability_col", "raw_prediction_col"):
            name = getattr(self, setting)
            if name is None and setting != "prediction_col":
                continue
            if not isinstance(name, str) or not name:
                raise ConfigError(f"{setting}={name!r}: must be a column's name.")
            if name in used:
                raise ConfigError(f"{setting}={name!r} is a column that training reads; choose another.")
            if name in written:
                raise ConfigError(f"{setting}={name!r} is written by another setting already; choose another.")
            written.append(name)


def described(settings: FitSettings) -> dict[str, Any]:
    """Every setting as a JSON value, for a log: callables and classes by name, and without the password of a URI."""
    values = {
        f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in ("local", "run", "model", "replay")
    }
    for part in (settings.local, settings.run):
        values |= {f.name: getattr(part, f.name) for f in fields(part)}
    for name in ("checkpoint_dir", "exchange_dir", "shard_dir"):
        values[name] = values[name] and shown_uri(os.fspath(values[name]))
    model = settings.model
    # A module's class: a digest of its weights says nothing to a reader.
    values["model"] = model if isinstance(model, str) or hasattr(model, "__qualname__") else type(model)
    return {name: describe(value) for name, value in sorted(values.items())}


def digest_of(settings: FitSettings, identity: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that differ between the fits of one search.

    Args:
        settings: of the fit.
        identity: of its run: rows, layout of the parameters and so on.
    """
    passing = (
        _PASSING if settings.buffers else {*_PASSING, "buffers"}
    )  # what is not given leaves the name of a search as it was
    values = {name: value for name, value in described(settings).items() if name not in passing}
    nameless = {f.name: _code(getattr(settings, f.name)) for f in fields(settings) if f.name not in passing}
    identity = {key: value for key, value in identity.items() if key not in SAID_LATER}
    whole = json.dumps([identity, values, nameless], sort_keys=True, default=str)
    return hashlib.blake2b(with_first_modules(whole).encode(), digest_size=8).hexdigest()


def _code(value: Any) -> Any:
    """For functions that have no name of their own (lambdas, functions made by functions): a digest of their code."""
    if isinstance(value, partial):
        return [_code(value.func), _code(value.args), _code(value.keywords)]
    if isinstance(value, Mapping):
        return {str(key): _code(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_code(one) for one in value]
    if "<" in getattr(value, "__qualname__", ""):
        return hashlib.blake2b(cloudpickle.dumps(value), digest_size=8).hexdigest()
    return None


def _at_rate(optimizer: Any, rate: Any, *, gradient: bool = False) -> Any:
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not rate >= 0:
        raise ConfigError(f"learning_rate={rate!r}: must be a number that is not negative.")
    if optimizer is None and gradient:
        raise ConfigError(
            f"learning_rate={rate!r} with work='gradient': replicas take no steps, and the rate is that of the outer optimizer. Give "
            "outer_optimizer=, such as partial(torch.optim.Adam, lr=1e-3)."
        )
    if optimizer is None:
        raise ConfigError(
            f"learning_rate={rate!r} without optimizer=: what a model's own configure_optimizers makes has its own rate. Give "
            "optimizer=, such as torch.optim.AdamW, or the rate in model_args."
        )
    if not callable(optimizer):
        return optimizer  # refused where callables are checked
    return partial(optimizer, lr=rate)
