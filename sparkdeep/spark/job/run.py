"""A spark-submit job: configuration in, exit code and result.json out."""

from __future__ import annotations

import argparse
import functools
import inspect
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparkdeep.errors import ConfigError, SparkdeepError
from sparkdeep.models.registry import import_factory
from sparkdeep.settings.run import EarlyStopping, from_mapping, refuse_unknown
from sparkdeep.spark.job.config import JobConfig, ObjectSection, parse_config, read_toml, with_overrides
from sparkdeep.spark.job.metrics import score, validation_metrics
from sparkdeep.spark.job.result import (
    FAILED,
    Watch,
    about_run,
    clear_result,
    exit_code_of,
    is_uri,
    result_of,
    status_of,
    write_records,
    write_report,
    write_result,
)
from sparkdeep.spark.job.sources import read_source, ship_modules, split_rows, start_session
from sparkdeep.spark.model.stored_values import NAMED_SETTINGS, named_value
from sparkdeep.storage.opening import Store, open_store
from sparkdeep.tracking.callbacks import Callback

__all__ = ["Job", "run_job", "spark_uri"]

_SECTION_ARGUMENTS = (
    "model",
    "model_args",
    "loss",
    "optimizer",
    "lr_scheduler",
    "outer_optimizer",
    "metrics",
    "buffers",
)
_PLACES = {"model_args": "[model] args", "metrics": "metrics = [...] at the top"}
_CALLABLES = ("callbacks", "collate", "decode", "augment", "prediction", "preprocess", "training_step")
_RELOADED = ("collate", "decode", "prediction", "preprocess")


@dataclass(kw_only=True)
class Job:
    """What a job's script works with; the session starts when it is first needed."""

    config: JobConfig
    """The checked configuration."""
    records: list[Any] = field(default_factory=list)
    """Round records in the order in which they were reported."""
    result: dict[str, Any] = field(default_factory=dict)
    """What the script adds to the result file."""
    options: argparse.Namespace = field(default_factory=argparse.Namespace)
    """The script's own command-line options."""
    watch: Watch | None = None
    """What the estimator's fits report; None before an estimator was made."""
    _session: Any = None

    def estimator(self) -> Any:
        """Makes the TorchEstimator of the configuration, before any session starts.

        Raises:
            ConfigError: an unknown key of `[fit]`, or a name that cannot be imported.
        """
        from sparkdeep import TorchEstimator

        config, watch = self.config, Watch(self.records)
        for name in _SECTION_ARGUMENTS:
            if name in config.fit:
                raise ConfigError(f"[fit] holds {name!r}: it has its own place, {_PLACES.get(name, f'[{name}]')}")
        if "feature_cols" not in config.fit:
            raise ConfigError('[fit] has no feature_cols: give feature_cols = ["column", ...]')
        _checked(config.model)
        fit = {key: _resolved(value) if key in _CALLABLES else value for key, value in config.fit.items()}
        fit["callbacks"] = [watch, *map(_made, fit.get("callbacks", ()))]
        if isinstance(fit.get("early_stopping"), dict):
            fit["early_stopping"] = from_mapping(EarlyStopping, fit["early_stopping"])
        fit |= {name: named_value(name, fit[name]) for name in NAMED_SETTINGS if name in fit}
        if "validation" in fit:
            fit["metrics"] = validation_metrics(config.metrics)
        parts = {"lr_scheduler": config.lr_scheduler, "outer_optimizer": config.outer_optimizer}
        made = TorchEstimator(
            model=config.model.name,
            model_args=config.model.args,
            loss=None if config.loss is None else _loss(config.loss),
            optimizer=_partial(config.optimizer),
            **{name: _partial(section) for name, section in parts.items() if section is not None},
            **fit,
        )
        self.watch = watch
        return made

    def session(self) -> Any:
        """Returns the SparkSession, started at the first call, with the user's modules sent to executors."""
        if self._session is None:
            specs = [section.name for section in self._sections()]
            if ":" in self.config.data.source:
                specs.append(self.config.data.source)
            specs += [value for key in _CALLABLES for value in _texts(self.config.fit.get(key))]
            for spec in specs:
                import_factory(spec)
            self._session = start_session(self.config.spark, app_name=f"sparkdeep {self.config.path.stem}")
            ship_modules(self._session, specs, _module_folders(self.config.path))
        return self._session

    def rows(self) -> Any:
        """Returns all rows of the source."""
        return read_source(self.session(), self.config.data)

    def split(self) -> tuple[Any, Any]:
        """Returns the training rows and the test rows."""
        data = self.config.data
        if isinstance(data.test, str):
            return self.rows(), read_source(self.session(), data, path=data.test)
        return split_rows(self.rows(), fraction=data.test, seed=data.seed)

    def load_model(self) -> Any:
        """Loads the model that train.py saved; the configuration's own module is the only one it may import."""
        from sparkdeep import TorchModel

        self.session()
        factory = self.config.model.name
        import_factory(factory)
        # Callables are not stored with a model: the configuration names them again.
        given = {key: _resolved(self.config.fit[key]) for key in _RELOADED if key in self.config.fit}
        return TorchModel.load(self.output("model"), allow_modules=[factory.partition(":")[0]], **given)

    def score(self, predictions: Any) -> dict[str, float]:
        """Scores predictions by the configuration's metrics, and keeps the scores for the result file."""
        if not self.config.metrics:
            return {}
        scores = score(predictions, label=self.label(), prediction=self.prediction(), names=self.config.metrics)
        self.result.update(scores)
        return scores

    def feature_pipeline(self) -> Any:
        """Makes the unfitted Spark ML pipeline that `[pipeline] features` names; None if it names none."""
        section = self.config.pipeline.features
        if section is None:
            return None
        made = _checked(section)
        self.session()
        return made(**section.args)

    def rows_to_score(self) -> Any:
        """Returns the rows of `[pipeline] score`; None if it names none."""
        path = self.config.pipeline.score
        return None if path is None else read_source(self.session(), self.config.data, path=path)

    def label(self) -> str:
        """Returns the label's column; ConfigError when metrics are named and the labels are not one column."""
        labels = self.config.fit.get("label_cols")
        if isinstance(labels, list) and len(labels) == 1:
            labels = labels[0]
        if not isinstance(labels, str):
            raise ConfigError(f'[fit] label_cols = {labels!r}: a job scores one label column, such as "label"')
        return labels

    def prediction(self) -> str:
        """Returns the prediction's column."""
        return str(self.config.fit.get("prediction_col", "prediction"))

    def output(self, name: str) -> str:
        """Returns the path or URI of something in the output folder."""
        folder = self.config.output.dir
        return f"{folder.rstrip('/')}/{name}" if is_uri(folder) else f"{Path(folder).absolute()}/{name}"

    def output_uri(self, name: str) -> str:
        """As `output`, for Spark: a local folder stays local when the cluster's default file system is another."""
        return spark_uri(self.output(name))

    def resumable(self) -> bool:
        """Tells whether the checkpoint folder holds a committed round."""
        folder = self.config.fit.get("checkpoint_dir")
        if not isinstance(folder, str):
            return False
        return any(name.endswith(".json") for name in open_store(folder, fallback=self.hadoop_store).list("commits"))

    def stop(self) -> None:
        """Stops the session, if one was started."""
        if self._session is not None:
            self._session.stop()
            self._session = None

    def hadoop_store(self, uri: str) -> Store:
        """Opens a URI through Spark's Hadoop file systems, for those that pyarrow does not know."""
        from sparkdeep.spark.session.hadoop import HadoopStore

        return HadoopStore(self.session(), uri)

    def _sections(self) -> list[ObjectSection]:
        config = self.config
        made = (config.model, config.loss, config.optimizer, config.lr_scheduler, config.outer_optimizer)
        return [section for section in made if section is not None]


def run_job(
    work: Callable[[Job], None],
    *,
    description: str,
    result_name: str,
    options: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Runs a job's work and writes its result file, whatever happens.

    Args:
        work: the job; what it raises is reported, not raised.
        description: for `--help`.
        result_name: the result file's name in the output folder.
        options: adds the script's own options to the parser; their values are `job.options`.
        argv: the arguments after the script's name; None takes sys.argv.

    Returns:
        The exit code: 0 done, 2 wrong configuration, 1 failed.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="the TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="fit.epochs=3; repeatable")
    if options is not None:
        options(parser)
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    signal.signal(signal.SIGTERM, _interrupt)
    path, folder, job, error = Path(arguments.config), None, None, None
    try:
        document = with_overrides(read_toml(path), arguments.set)
        folder = output_folder(document, path)
        clear_result(folder, result_name)
        sys.path.extend(str(home) for home in _module_folders(path) if str(home) not in sys.path)
        job = Job(config=parse_config(document, path), options=arguments)
        work(job)
    except BaseException as raised:  # noqa: BLE001 (any end, also an interrupt, is reported and written)
        error = raised
    code = exit_code_of(error)
    if error is not None:
        if code == FAILED:
            traceback.print_exception(error, file=sys.stderr)
        sys.stderr.write(f"{status_of(error)}: {error or type(error).__name__}\n")
    if folder is not None:
        _report(folder, result_name, job, error, seconds=time.monotonic() - started)
    if job is not None:
        job.stop()
    return code


def _report(folder: str, name: str, job: Job | None, error: BaseException | None, *, seconds: float) -> None:
    if job is None:
        write_result(folder, name, result_of(error, rounds=0, resumable=False, seconds=seconds))
        return
    try:
        resumable = job.resumable()
    except (SparkdeepError, OSError) as unreadable:
        resumable = False
        sys.stderr.write(f"resumable: false, as the checkpoint folder cannot be read: {unreadable}\n")
    if job.records:
        write_records(folder, job.records, fallback=job.hadoop_store)
    content = {**result_of(error, rounds=len(job.records), resumable=resumable, seconds=seconds), **job.result}
    write_result(folder, name, content, fallback=job.hadoop_store)
    if job.watch is not None:
        write_report(
            folder,
            job.records,
            about_run(job.config, job.watch.info, error, job.result),
            fallback=job.hadoop_store,
        )


def spark_uri(path: str) -> str:
    """A path as Spark takes it: a local one stays local when the cluster's default file system is another."""
    return path if is_uri(path) else f"file://{Path(path).absolute()}"


def output_folder(document: Mapping[str, Any], path: Path) -> str:
    """Returns the output folder of a document that is otherwise unchecked."""
    section = document.get("output")
    folder = section.get("dir") if isinstance(section, dict) else None
    return folder if isinstance(folder, str) else f"runs/{path.stem}"


def _checked(section: ObjectSection) -> Any:
    """Imports a section's class or function, and refuses arguments that it does not take."""
    made = import_factory(section.name)
    parameters = inspect.signature(made).parameters
    if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
        refuse_unknown(section.args, parameters, f"argument of {section.name!r}")
    return made


def _loss(section: ObjectSection) -> Any:
    made = _checked(section)
    if not inspect.isclass(made):
        return functools.partial(made, **section.args) if section.args else made
    try:
        return made(**section.args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"[loss] {section.name}({section.args}) cannot be made: {error}") from error


def _partial(section: ObjectSection) -> Any:
    made = _checked(section)
    return functools.partial(made, **section.args) if section.args else made


def _resolved(value: Any) -> Any:
    """Imports each "module:name"; words such as "argmax" stay."""
    if isinstance(value, str):
        return import_factory(value) if ":" in value else value
    if isinstance(value, list):
        return [_resolved(item) for item in value]
    return {key: _resolved(item) for key, item in value.items()} if isinstance(value, dict) else value


def _made(callback: Any) -> Any:
    """An object in place of a Callback's class, which is what a file can name."""
    return callback() if inspect.isclass(callback) and issubclass(callback, Callback) else callback


def _texts(value: Any) -> list[str]:
    """The names in a `[fit]` value that `_resolved` imports."""
    if isinstance(value, str):
        return [value] if ":" in value else []
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def _module_folders(path: Path) -> list[Path]:
    """Where a job's own modules may lie: beside the configuration, the working directory, beside the script."""
    return [path.absolute().parent, Path.cwd(), Path(sys.argv[0]).absolute().parent]


def _interrupt(number: int, _frame: Any) -> None:
    raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")
