"""Which columns a model reads and writes: its params against the schema that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sparkdeep.data.schema import Callables, ColumnNames, Field, Schema, names_in
from sparkdeep.errors import ConfigError

__all__ = ["VECTORS", "Columns", "by_column", "feature_cols_of"]

VECTORS: Final = ("probability", "raw_prediction")
"""What is written for a classifier beside its prediction, each to the column of the setting NAME_col."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What `transform` reads and writes."""

    schema: Schema
    """The schema of the training, over the columns that are read now."""
    renamed: Mapping[str, str]
    """Column of the training -> column that is read now."""
    outputs: Mapping[str, str]
    """"prediction" and those of `VECTORS` that are written -> column."""

    @classmethod
    def of(cls, schema: Schema, values: Mapping[str, Any]) -> Columns:
        """Check a model's params.

        Args:
            schema: of the training.
            values: every param by name.

        Raises:
            ConfigError: a value, or two together, cannot be meant.
        """
        outputs = {part: values[f"{part}_col"] for part in ("prediction", *VECTORS)}
        outputs = {part: name for part, name in outputs.items() if name is not None or part == "prediction"}
        for part, name in outputs.items():
            if not isinstance(name, str) or not name:
                raise ConfigError(f"{part}_col={name!r}: must be a column's name.")
        for part, name in outputs.items():
            if [one.casefold() for one in outputs.values()].count(name.casefold()) > 1:
                raise ConfigError(f"{part}_col={name!r} is the name of two columns to write; choose another.")
        read, renamed = _renamed(schema, values["feature_cols"])
        return cls(schema=read, renamed=renamed, outputs=outputs)

    @property
    def features(self) -> tuple[str, ...]:
        """The columns that are read, in order."""
        return tuple(dict.fromkeys(column for field in _features(self.schema) for column in field.columns))

    @property
    def vectors(self) -> tuple[str, ...]:
        """Those of `VECTORS` that are written."""
        return tuple(part for part in VECTORS if part in self.outputs)

    def refuse_taken(self, there: Sequence[str]) -> None:
        """Refuse a DataFrame that has a column of a name to be written.

        Raises:
            ConfigError: with the column.
        """
        taken = {name.casefold(): name for name in there}
        for part, name in self.outputs.items():
            if name.casefold() in taken:  # Spark resolves names without regard to case: it would be replaced silently
                raise ConfigError(
                    f"column {taken[name.casefold()]!r} is in the DataFrame already; drop or rename it, or choose another "
                    f"{part}_col."
                )


def feature_cols_of(schema: Schema) -> ColumnNames:
    """The setting `feature_cols` from which the schema was made."""
    given = {f.argument: list(f.columns) if f.stacked else f.columns[0] for f in _features(schema)}
    return given[None] if None in given else {str(argument): names for argument, names in given.items()}


def by_column(callables: Callables, renamed: Mapping[str, str]) -> Callables:
    """A setting that is one callable, or one a column, for the columns that are read now."""
    if not isinstance(callables, Mapping):
        return callables
    return {renamed.get(column, column): function for column, function in callables.items()}


def _features(schema: Schema) -> list[Field]:
    return [field for field in schema.fields if field.role == "features"]


def _renamed(schema: Schema, feature_cols: Any) -> tuple[Schema, dict[str, str]]:
    given = feature_cols if isinstance(feature_cols, Mapping) else {None: feature_cols}
    usable = all(isinstance(one, str | list | tuple) for one in given.values())
    names = {argument: names_in(one) for argument, one in given.items()} if usable else {}
    if {argument: len(one) for argument, one in names.items()} != {
        f.argument: len(f.columns) for f in _features(schema)
    }:
        raise ConfigError(
            f"feature_cols={feature_cols!r}: the model was trained on {feature_cols_of(schema)!r}; give as many columns in "
            "the same form."
        )
    fields = tuple(replace(f, columns=tuple(names[f.argument])) if f.role == "features" else f for f in schema.fields)
    pairs = [pair for f in _features(schema) for pair in zip(f.columns, names[f.argument], strict=True)]
    return Schema(fields=fields, float_dtype=schema.float_dtype), dict(pairs)
