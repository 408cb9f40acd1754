"""Runs in MLflow: settings, numbers by round, and the model; a server that is down costs a warning, not the fit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final, Literal, final

from sparkdeep.errors import ConfigError
from sparkdeep.tracking.callbacks import Callback, FitInfo
from sparkdeep.tracking.outbox import Outbox
from sparkdeep.tracking.records import RoundRecord, numbers_of

if TYPE_CHECKING:
    from sparkdeep.spark.model.model import TorchModel

__all__ = ["MLflowCallback", "log_model", "mlflow_module"]

_PARENT: Final = "mlflow.parentRunId"
_MOST_METRICS: Final = 1000  # per request, as MLflow allows
_MOST_PARAMS: Final = 100
_MOST_PARAM_CHARACTERS: Final = 6000
_TRANSIENT: Final = frozenset(
    {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"}
)


@dataclass(frozen=True, kw_only=True)
class _Round:
    """A round's numbers, to be sent."""

    number: int
    numbers: dict[str, float]
    at_ms: int

    def __str__(self) -> str:
        return f"the numbers of round {self.number}"


@dataclass(frozen=True, kw_only=True)
class _Call:
    """Anything else to be sent."""

    what: str
    do: Callable[[str], None]
    """Called with the run's id."""

    def __str__(self) -> str:
        return self.what


@final
class MLflowCallback(Callback):
    """Logs a fit to MLflow; needs the extra `mlflow`.

    The settings become parameters; each round's loss, validation scores, rows a second and seconds by phase become
    metrics with the round as their step; and the model becomes a pyfunc (see `log_model`). All of it goes through the
    driver's tracking URI. If a run is active when the fit starts, that one is used and left open; otherwise the fit has
    a run of its own.

    Training never waits for any of this. When the server is down, a warning says so once, training goes on, and
    what could not be sent is kept in order and tried again. At the end the server has `timeout_s` more; what it has then
    still not accepted stays in memory for `flush()`, until the next fit begins. One object follows one fit at a time.

    Args:
        experiment: its name, made if it is new; None: MLflow's current one.
        run_name: of the fit's own run.
        nested: make the fit's own run a child of the active one, as for a search over settings.
        model_name: under which the model is logged; None logs no model.
        registered_model_name: under which it is also registered.
        code_paths: see `log_model`.
        pickle: see `log_model`.
        timeout_s: for each request, and for the server to come back at the end; MLFLOW_HTTP_REQUEST_TIMEOUT and
            MLFLOW_HTTP_REQUEST_MAX_RETRIES, where they are set, take precedence for requests.

    Attributes:
        run_id: of the run, once it is known.

    Raises:
        ConfigError: MLflow is not installed. It is raised when the callback is made, so that no fit runs in vain.
    """

    def __init__(
        self,
        experiment: str | None = None,
        *,
        run_name: str | None = None,
        nested: bool = False,
        model_name: str | None = "model",
        registered_model_name: str | None = None,
        code_paths: Sequence[str] = (),
        pickle: bool = False,
        timeout_s: float = 15.0,
    ) -> None:
        mlflow_module()
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s={timeout_s!r}: must be a positive number of seconds.")
        self.run_id: str | None = None
        self._experiment = experiment
        self._run_name = run_name
        self._nested = nested
        self._model_name = model_name
        self._logged: dict[str, Any] = {
            "registered_model_name": registered_model_name,
            "code_paths": list(code_paths),
            "pickle": pickle,
        }
        self._timeout_s = timeout_s
        self._parent: str | None = None
        self._owned = False
        self._outbox: Outbox | None = None

    def on_fit_start(self, info: FitInfo) -> None:
        """Begin a run, or join the active one, and log the settings."""
        active = mlflow_module().active_run()
        self.run_id, self._parent = None, None
        if active is not None and self._nested:
            self._parent = active.info.run_id
        elif active is not None:
            self.run_id = active.info.run_id
        self._owned = self.run_id is None
        self._outbox = Outbox(
            "MLflow",
            self._send,
            _is_transient,
            timeout_s=self._timeout_s,
            progress_timeout_s=max(600.0, self._timeout_s),
        )
        params = {**info.settings, "train_rows": info.rows, "num_parameters": info.num_parameters}
        names = list(params)
        for start in range(0, len(names), _MOST_PARAMS):
            part = {name: _text(params[name]) for name in names[start : start + _MOST_PARAMS]}
            self._put("the settings", _batch("params", part))
        tags = {"sparkdeep.rounds.run": info.run, "sparkdeep.num_rounds": str(info.num_rounds)}
        if info.committed:
            tags["sparkdeep.resumed_after_round"] = str(info.committed)
        self._put("the run's tags", _batch("tags", tags))

    def on_round_end(self, record: RoundRecord) -> None:
        """Log a round's numbers."""
        assert self._outbox is not None, "on_fit_start came first"
        self._outbox.put(_Round(number=record.round, numbers=numbers_of(record), at_ms=int(time.time() * 1000)))

    def on_fit_end(self, model: TorchModel | None, error: BaseException | None) -> None:
        """Log the model, and end the fit's own run as finished, failed or killed."""
        if self._outbox is None:
            return
        if model is not None and self._model_name is not None:
            name, options = self._model_name, self._logged
            self._put("the model", lambda run_id: log_model(model, name, run_id=run_id, **options))
        status = "FINISHED"
        if error is not None:
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            self._put("the error", _batch("tags", {"sparkdeep.error": f"{type(error).__name__}: {error}"[:5000]}))
        if self._owned:
            self._put("the run's end", lambda run_id: _end(run_id, status))
        self._outbox.close()

    def flush(self) -> int:
        """Try again to send what the server did not accept; returns how many items are left."""
        return 0 if self._outbox is None else self._outbox.close()

    def _put(self, what: str, do: Callable[[str], None]) -> None:
        assert self._outbox is not None
        self._outbox.put(_Call(what=what, do=do))

    def _send(self, items: Sequence[Any]) -> int:
        """Runs in the outbox's thread."""
        with _bounded(self._timeout_s):
            if self.run_id is None:
                self.run_id = self._begin()
            first = items[0]
            if isinstance(first, _Call):
                first.do(self.run_id)
                return 1
            rounds = list(takewhile(lambda item: isinstance(item, _Round), items))
            most = max(1, _MOST_METRICS // max(len(one.numbers) for one in rounds))
            _log_rounds(self.run_id, rounds[:most])
            return min(most, len(rounds))

    def _begin(self) -> str:
        mlflow = mlflow_module()
        experiment = None
        if self._experiment is not None:
            client = mlflow.MlflowClient()
            known = client.get_experiment_by_name(self._experiment)
            experiment = client.create_experiment(self._experiment) if known is None else known.experiment_id
        tags = {_PARENT: self._parent} if self._parent else None
        run = mlflow.start_run(
            experiment_id=experiment, run_name=self._run_name, nested=self._parent is not None, tags=tags
        )
        return str(run.info.run_id)


def log_model(
    model: TorchModel,
    name: str = "model",
    *,
    run_id: str | None = None,
    registered_model_name: str | None = None,
    code_paths: Sequence[str] = (),
    pickle: bool = False,
) -> Any:
    """Log a model to MLflow, with its signature, as a pyfunc: `mlflow.pyfunc.load_model(uri).predict(pandas_frame)`.

    The pyfunc takes the feature columns and gives the prediction's; it needs neither Spark's JVM nor a GPU. The network
    is found by the name of its class or factory, which must be importable where the model is loaded.

    Args:
        model: the trained model.
        name: of it within the run.
        run_id: of the run; None: the active one, or a new one.
        registered_model_name: under which it is also registered.
        code_paths: files and folders with the network's source, logged beside it and put on sys.path by loading.
        pickle: log the module itself with cloudpickle, for a network defined in a notebook. Loading it runs what it
            holds, as loading any pyfunc does.

    Returns:
        MLflow's ModelInfo; its `model_uri` loads the model.

    Raises:
        ConfigError: the model could not be loaded in another process; the message says what to do about it.
    """
    mlflow_module()
    # Only rooms above this one know what a model is made of.
    return model._log_to_mlflow(
        name,
        run_id=run_id,
        registered_model_name=registered_model_name,
        code_paths=list(code_paths),
        pickle=pickle,
    )


def mlflow_module(part: str = "") -> Any:
    """MLflow, or the part of it called `mlflow.PART`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(f"mlflow.{part}" if part else "mlflow")
    except ImportError as error:
        raise ConfigError(
            f"logging to MLflow needs mlflow, which cannot be imported ({error}): pip install 'sparkdeep[mlflow]'."
        ) from error


def _log_rounds(run_id: str, rounds: Sequence[_Round]) -> None:
    metric = mlflow_module("entities").Metric
    metrics = [
        metric(key=name, value=value, timestamp=one.at_ms, step=one.number)
        for one in rounds
        for name, value in one.numbers.items()
    ]
    mlflow_module().MlflowClient().log_batch(run_id, metrics=metrics)


def _batch(kind: Literal["params", "tags"], values: dict[str, str]) -> Callable[[str], None]:
    """A function that logs values by name to a run, as what MLflow calls them."""

    def log(run_id: str) -> None:
        made = getattr(mlflow_module("entities"), {"params": "Param", "tags": "RunTag"}[kind])
        mlflow_module().MlflowClient().log_batch(run_id, **{kind: [made(*one) for one in values.items()]})

    return log


def _end(run_id: str, status: str) -> None:
    mlflow = mlflow_module()
    active = mlflow.active_run()
    if active is not None and active.info.run_id == run_id:
        mlflow.end_run(status)
    else:
        mlflow.MlflowClient().set_terminated(run_id, status)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _MOST_PARAM_CHARACTERS else f"{text[: _MOST_PARAM_CHARACTERS - 3]}..."


def _is_transient(error: Exception) -> bool:
    if isinstance(error, mlflow_module("exceptions").MlflowException):
        return getattr(error, "error_code", "") in _TRANSIENT
    return isinstance(error, OSError)  # the errors of requests are of this class, too


@contextmanager
def _bounded(timeout_s: float) -> Iterator[None]:
    """MLflow's own requests end within `timeout_s`; by default it would try for many minutes."""
    settings = mlflow_module("environment_variables")
    limits = {
        settings.MLFLOW_HTTP_REQUEST_TIMEOUT: max(1, round(timeout_s)),
        settings.MLFLOW_HTTP_REQUEST_MAX_RETRIES: 0,
    }
    changed = [(setting, value) for setting, value in limits.items() if not setting.is_set()]
    for setting, value in changed:
        setting.set(value)
    try:
        yield
    finally:
        for setting, _ in changed:
            setting.unset()
