"""A job's rows: the session, the source, and the split into training and held-out rows."""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparkdeep.errors import ConfigError
from sparkdeep.models.registry import import_factory
from sparkdeep.settings.run import refuse_unknown
from sparkdeep.spark.job.config import DataSection, SparkSection

__all__ = ["read_source", "ship_modules", "split_rows", "start_session"]

_HASH_STEPS = 1_000_000
_NAMED = {"digits": "digits:digits_dataframe"}
_FORMATS = ("parquet", "csv")


def start_session(section: SparkSection, *, app_name: str) -> Any:
    """Starts or takes the SparkSession; a property that spark-submit was given outranks the configuration's.

    spark-submit without `--master` says local[*], so that master alone counts as not given.
    """
    from pyspark import SparkConf
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.appName(app_name)
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        # Not under spark-submit: workers must run this interpreter, not the first python3 on PATH.
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        builder = builder.master(section.master)
        given = {}
    else:
        from pyspark import SparkContext

        SparkContext._ensure_initialized()
        given = dict(SparkConf().getAll())
        if given.get("spark.master", "local[*]") == "local[*]":
            builder = builder.master(section.master)
    for key, value in section.conf.items():
        if key not in given:
            builder = builder.config(key, value)
    return builder.getOrCreate()


def ship_modules(session: Any, specs: Iterable[str], folders: Sequence[Path]) -> None:
    """Sends the user's own modules to the executors, whose search path does not hold the configuration's folder.

    Args:
        session: the SparkSession.
        specs: "package.module:name" texts; each one's top-level module or package is sent if it lies in a folder.
        folders: where the user's modules lie. What is installed, here and there alike, is not sent.
    """
    homes = {folder.resolve() for folder in folders}
    for name in sorted({spec.partition(":")[0].partition(".")[0] for spec in specs} - {"sparkdeep"}):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is None:
            continue
        path = Path(file).resolve()
        if path.parent in homes:
            _add_file(session, path)
        elif path.name == "__init__.py" and path.parent.parent in homes:
            archive = Path(tempfile.mkdtemp(prefix="sparkdeep-modules-")) / f"{name}.zip"
            with zipfile.ZipFile(archive, "w") as file_of_package:
                for source in sorted(path.parent.rglob("*.py")):
                    file_of_package.write(source, source.relative_to(path.parent.parent))
            _add_file(session, archive)


def _add_file(session: Any, path: Path) -> None:
    from pyspark.sql.utils import is_remote

    if is_remote():
        session.addArtifacts(str(path), pyfile=True)
    else:
        session.sparkContext.addPyFile(str(path))


def read_source(session: Any, section: DataSection, *, path: str | None = None) -> Any:
    """Reads a job's source as a DataFrame of its `columns`.

    Args:
        session: the SparkSession.
        section: `[data]`.
        path: read this path in place of the section's own (the held-out rows' path).

    Raises:
        ConfigError: an unknown source, or one that Spark cannot find or analyze.
    """
    from pyspark.errors import AnalysisException

    try:
        frame = _open(session, section, path)
        return frame.selectExpr(*section.columns) if section.columns else frame
    except AnalysisException as error:
        first_line = str(error).partition("\n")[0]
        raise ConfigError(f"[data] source {section.source!r} cannot be read: {first_line}") from error


def _open(session: Any, section: DataSection, path: str | None) -> Any:
    if ":" in section.source or section.source in _NAMED:
        if path is not None:
            raise ConfigError(f"[data] test = {path!r}: source {section.source!r} has no path; give test a fraction")
        return import_factory(_NAMED.get(section.source, section.source))(session, **section.options)
    refuse_unknown([section.source], (*_FORMATS, "table", *_NAMED), "[data] source")
    reader = session.read.options(**section.options)
    if section.source == "table":
        name = path or section.table
        if name is None:
            raise ConfigError('[data] source = "table" needs table = "catalog.schema.name"')
        return reader.table(name)
    where = path or section.path
    if where is None:
        raise ConfigError(f"[data] source = {section.source!r} needs path = the folder or file to read")
    return reader.format(section.source).load(where)


def split_rows(frame: Any, *, fraction: float, seed: int) -> tuple[Any, Any]:
    """Splits rows by a hash of each row's values, so that no order, cluster or repetition changes the split.

    Equal rows fall on the same side. Map columns, which Spark does not hash, do not take part.

    Args:
        frame: the rows.
        fraction: expected share of the second part, in (0, 1).
        seed: of the hash.

    Returns:
        The training rows and the held-out rows.

    Raises:
        ConfigError: no column can be hashed.
    """
    from pyspark.sql import functions as F

    names = [name for name, kind in frame.dtypes if "map<" not in kind]
    if not names:
        raise ConfigError("[data] test is a fraction, but no column can be hashed (all hold maps): give test a path")
    hashed = F.xxhash64(F.lit(seed), *(F.col(f"`{name}`") for name in names))
    held_out = F.pmod(hashed, F.lit(_HASH_STEPS)) < F.lit(round(fraction * _HASH_STEPS))
    return frame.where(~held_out), frame.where(held_out)
