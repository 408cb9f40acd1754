"""What a job's TOML file may say: sections, `--set` overrides, unknown keys refused with a suggestion."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparkdeep.errors import ConfigError
from sparkdeep.settings.run import refuse_unknown

__all__ = [
    "METRICS",
    "DataSection",
    "JobConfig",
    "ObjectSection",
    "OutputSection",
    "PipelineSection",
    "SparkSection",
    "load_config",
]

METRICS = ("accuracy", "mae", "rmse")
"""Test metrics by name; the first of a job's list is the one that train.py prints first."""

_SECTIONS = (
    "data",
    "model",
    "loss",
    "optimizer",
    "lr_scheduler",
    "outer_optimizer",
    "fit",
    "metrics",
    "output",
    "pipeline",
    "spark",
)
_MOST_LEVELS = 64
_REQUIRED = ("data", "model", "optimizer")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Where rows come from, and which of them are held out."""

    source: str
    """"parquet", "csv", "table", "digits", or "module:function" called with the session and `options`."""
    path: str | None = None
    """Folder or file of a parquet or csv source; relative paths are relative to the working directory."""
    table: str | None = None
    """Catalog name of a table source."""
    options: dict[str, Any] = field(default_factory=dict)
    """Reader options of the source, or keyword arguments of its function."""
    columns: tuple[str, ...] = ()
    """Columns and SQL expressions to keep, as `selectExpr` takes them; empty keeps every column."""
    test: float | str = 0.2
    """Fraction of the rows held out (by a hash of each row), or the path of a second source of the same kind."""
    seed: int = 0
    """Seed of the hash that holds rows out; the same seed and rows give the same split on any cluster."""


@dataclass(frozen=True, kw_only=True)
class ObjectSection:
    """Something made from a name and arguments: a model, a loss, an optimizer, a scheduler."""

    name: str
    """"package.module:name" of a class or function."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for it."""


@dataclass(frozen=True, kw_only=True)
class OutputSection:
    """Where a job writes."""

    dir: str
    """Folder of model/, predictions/, rounds.jsonl and result.json."""


@dataclass(frozen=True, kw_only=True)
class PipelineSection:
    """What jobs/pipeline.py needs beside the rest."""

    features: ObjectSection | None = None
    """"module:function" of keyword arguments: returns the Spark ML Pipeline that makes the feature columns."""
    gate: dict[str, float] = field(default_factory=dict)
    """Metric -> bound that the test rows must keep: at least, for accuracy; at most, for errors."""
    publish: str | None = None
    """Folder of published models; default: published/ in the output folder."""
    score: str | None = None
    """Path of the rows to score, of the same kind as `[data]`; default: the test rows."""


@dataclass(frozen=True, kw_only=True)
class SparkSection:
    """The session of a job; what spark-submit was given outranks all of it."""

    master: str = "local[2]"
    """Master URL when spark-submit is not given one."""
    conf: dict[str, str] = field(default_factory=dict)
    """Spark properties, "spark.sql.shuffle.partitions" and the like."""


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """One job's configuration, checked."""

    path: Path
    """The TOML file; its folder is searched for the modules that the file names."""
    data: DataSection
    """`[data]`"""
    model: ObjectSection
    """`[model]`: factory = "package.module:factory" and args"""
    loss: ObjectSection | None
    """`[loss]`; not needed with a training_step in `[fit]`"""
    optimizer: ObjectSection
    """`[optimizer]`, of each replica"""
    lr_scheduler: ObjectSection | None
    """`[lr_scheduler]`, of each replica's optimizer"""
    outer_optimizer: ObjectSection | None
    """`[outer_optimizer]`, of the driver"""
    fit: dict[str, Any]
    """`[fit]`: the other arguments of TorchEstimator"""
    metrics: tuple[str, ...]
    """`metrics = [...]`: names from METRICS"""
    output: OutputSection
    """`[output]`"""
    pipeline: PipelineSection = field(default_factory=PipelineSection)
    """`[pipeline]`"""
    spark: SparkSection
    """`[spark]`"""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Reads a job's TOML file.

    Args:
        path: the file.
        overrides: "dotted.key=value" texts, applied in order; values are TOML, and text that is no TOML value
            counts as a string.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or has an unknown key, a missing one, or a wrong type.
    """
    return parse_config(with_overrides(read_toml(path), overrides), Path(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """Reads a TOML file as a dictionary; ConfigError names the file and, for bad TOML, the line."""
    try:
        return _checked(tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {str(path)!r} cannot be read ({error}): give a TOML file") from error
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # besides bad TOML: numbers and nesting that no parser takes
        raise ConfigError(f"configuration {str(path)!r} is not TOML: {error}") from error


def _checked(document: dict[str, Any]) -> dict[str, Any]:
    """Returns the document if its numbers are TOML's, of 64 bits, and its tables few enough to be walked and shown."""
    level: list[Any] = [document]
    for _ in range(_MOST_LEVELS):
        for value in level:
            if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
                raise ConfigError(f"a whole number of {value.bit_length()} bits: TOML's have 64")
        inner = [
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list)
        ]
        level = [value for values in inner for value in values]
        if not level:
            return document
    raise ConfigError(f"more than {_MOST_LEVELS} tables and arrays stand in each other: no setting needs so many")


def with_overrides(document: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the document with each "dotted.key=value" applied; tables of the document are not changed."""
    result = dict(document)
    for text in overrides:
        result = _with_value(result, *_parse_override(text), text)
    return result


def _parse_override(text: str) -> tuple[list[str], Any]:
    rule = "--set takes dotted.key=value, as in fit.epochs=5 or 'model.args.hidden=64'"
    key, equals, value_text = text.partition("=")
    if not equals or "\n" in text:
        raise ConfigError(f"--set {text!r}: {rule}")
    try:
        node: Any = tomllib.loads(f"{key} = 0")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--set {text[:200]!r} has no TOML key before '=': {rule}") from error
    keys: list[str] = []
    if not node:  # a comment
        raise ConfigError(f"--set {text!r} has no TOML key before '=': {rule}")
    while isinstance(node, dict):
        name, node = next(iter(node.items()))
        keys.append(name)
    if len(keys) > _MOST_LEVELS:
        raise ConfigError(
            f"--set {text[:200]!r} has a key of {len(keys)} parts; no setting has more than {_MOST_LEVELS}"
        )
    try:
        return keys, _checked(tomllib.loads(f"value = {value_text}"))["value"]
    except ConfigError as error:
        raise ConfigError(f"--set {text[:200]!r}: {error}") from error
    except (ValueError, RecursionError) as error:
        # A bare word is a string, for the shell's sake; what opens like another TOML value is a slip.
        if value_text.strip()[:1] in {"[", "{", '"', "'"}:
            raise ConfigError(f"--set {text!r}: the value is not TOML ({error})") from error
        return keys, value_text.strip()


def _with_value(table: Mapping[str, Any], keys: Sequence[str], value: Any, text: str) -> dict[str, Any]:
    head, rest = keys[0], keys[1:]
    if rest:
        inner = table.get(head, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {text!r}: {head!r} holds {inner!r}, which has no keys: set {head!r} itself")
        value = _with_value(inner, rest, value, text)
    return {**table, head: value}


def parse_config(document: Mapping[str, Any], path: Path) -> JobConfig:
    """Checks a document's sections, keys and types, and returns it as a JobConfig; ConfigError otherwise."""
    refuse_unknown(_checked(dict(document)), _SECTIONS, "section")
    for name in _REQUIRED:
        if name not in document:
            raise ConfigError(
                f"{str(path)!r} has no [{name}]: a job needs {', '.join(f'[{one}]' for one in _REQUIRED)}"
            )
    model = dict(_table(document, "model"))
    refuse_unknown(model, ("factory", "args"), "key of [model]")
    if "factory" in model:
        model["name"] = model.pop("factory")
    else:
        raise ConfigError('[model] has no factory: give factory = "package.module:factory"')
    return JobConfig(
        path=path,
        data=_data(_table(document, "data")),
        model=_object(model, "model"),
        loss=_optional_object(document, "loss"),
        optimizer=_object(_table(document, "optimizer"), "optimizer"),
        lr_scheduler=_optional_object(document, "lr_scheduler"),
        outer_optimizer=_optional_object(document, "outer_optimizer"),
        fit=dict(_table(document, "fit")),
        metrics=_metrics(document.get("metrics", [])),
        output=_output(_table(document, "output"), path),
        pipeline=_pipeline(_table(document, "pipeline")),
        spark=_spark(_table(document, "spark")),
    )


def _data(table: Mapping[str, Any]) -> DataSection:
    refuse_unknown(table, DataSection.__dataclass_fields__, "key of [data]")
    _typed(table, "data", source=str, path=str, table=str, options=dict, columns=list, test=(int, float, str), seed=int)
    if "source" not in table:
        raise ConfigError('[data] has no source: give "parquet", "csv", "table" or "module:function"')
    test = table.get("test", DataSection.test)
    if not isinstance(test, str) and not 0.0 < test < 1.0:
        raise ConfigError(f"[data] test = {test!r} must be a fraction between 0 and 1, or the path of held-out rows")
    return DataSection(**{**table, "columns": _strings(table.get("columns", []), "[data] columns")})


def _object(table: Mapping[str, Any], name: str) -> ObjectSection:
    refuse_unknown(table, ("name", "args"), f"key of [{name}]")
    _typed(table, name, name=str, args=dict)
    spec = table.get("name", "")
    module, colon, attribute = spec.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f'[{name}] names {spec!r}: write "package.module:name"')
    return ObjectSection(**table)


def _optional_object(document: Mapping[str, Any], name: str) -> ObjectSection | None:
    return _object(_table(document, name), name) if name in document else None


def _output(table: Mapping[str, Any], path: Path) -> OutputSection:
    refuse_unknown(table, ("dir",), "key of [output]")
    _typed(table, "output", dir=str)
    return OutputSection(dir=table.get("dir", f"runs/{path.stem}"))


def _pipeline(table: Mapping[str, Any]) -> PipelineSection:
    refuse_unknown(table, PipelineSection.__dataclass_fields__, "key of [pipeline]")
    _typed(table, "pipeline", features=dict, gate=dict, publish=str, score=str)
    gate = table.get("gate", {})
    refuse_unknown(gate, METRICS, "metric in [pipeline] gate")
    _typed(gate, "pipeline.gate", **dict.fromkeys(gate, (float, int)))
    features = _object(table["features"], "pipeline.features") if "features" in table else None
    return PipelineSection(**{**table, "features": features, "gate": {name: float(gate[name]) for name in gate}})


def _metrics(names: Any) -> tuple[str, ...]:
    refuse_unknown(_strings(names, "metrics"), METRICS, "metric")
    return tuple(names)


def _spark(table: Mapping[str, Any]) -> SparkSection:
    _typed(table, "spark", master=str)
    conf: dict[str, str] = {}

    def flatten(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                flatten(value, f"{prefix}{key}.")
            else:
                conf[f"{prefix}{key}"] = str(value).lower() if isinstance(value, bool) else str(value)

    flatten({key: value for key, value in table.items() if key != "master"}, "")
    for key in conf:
        if not key.startswith("spark."):
            raise ConfigError(
                f"[spark] has the unknown key {key!r}: it may hold master, and Spark properties in quotes, "
                '"spark.sql.shuffle.partitions" = 4'
            )
    return SparkSection(master=table.get("master", SparkSection.master), conf=conf)


def _table(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = document.get(name, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{name} = {value!r} must be a table: write [{name}] and its keys below")
    return value


def _typed(table: Mapping[str, Any], where: str, /, **types: type | tuple[type, ...]) -> None:
    for key, kind in types.items():
        # To isinstance a bool is an int, but it is never meant as a number.
        if key in table and (not isinstance(table[key], kind) or isinstance(table[key], bool)):
            names = " or ".join(_TOML_NAMES[one] for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise ConfigError(f"[{where}] {key} = {table[key]!r} must be {names}")


_TOML_NAMES = {str: "a string", int: "an integer", float: "a number", dict: "a table", list: "an array"}


def _strings(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f'{where} = {value!r} must be an array of strings, ["a", "b"]')
    return tuple(value)
