"""Which columns make which field: the user's column settings checked against the DataFrame's types."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from sparkdeep.checks import misfit
from sparkdeep.errors import ConfigError, DataError

__all__ = [
    "Callables",
    "ColumnKind",
    "ColumnNames",
    "ColumnType",
    "Field",
    "Role",
    "Schema",
    "build_schema",
    "callable_for",
    "names_in",
]

ColumnKind = Literal["scalar", "array", "vector", "binary"]
Role = Literal["features", "label", "weight"]
ColumnNames = str | Sequence[str] | Mapping[str, str | Sequence[str]]
Callables = Mapping[str, Callable[..., Any]] | Callable[..., Any] | None


@dataclass(frozen=True, kw_only=True)
class ColumnType:
    """What one DataFrame column holds."""

    kind: ColumnKind
    """A number or boolean a row, an array (of arrays) of them, a Spark ML vector, or bytes."""
    dtype: str
    """numpy dtype of the element's Spark type: int8 to int64, float32, float64, bool; "bytes" for binary."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One contiguous array in a shard, one tensor in a batch."""

    name: str
    """`features`, `features.dense`, `label`, `label.x` or `weight`."""
    role: Role
    """What the field is for."""
    argument: str | None
    """Key of the dict form (for features the argument of `forward`); None when positional."""
    columns: tuple[str, ...]
    """DataFrame columns in the order in which they are laid side by side."""
    stacked: bool
    """True for the list form, (B, k); False for the column's natural shape, in which scalars are (B,)."""
    dtype: str
    """numpy dtype stored; "decoded" until the first row of a binary column has been seen."""
    ragged: bool
    """Rows differ in length, and `collate` makes the tensor."""
    shape: tuple[int, ...] | None = None
    """Shape of one row; () for scalars and ragged rows; None until the first rows were seen."""


@dataclass(frozen=True, kw_only=True)
class Schema:
    """All fields of a fit, in the order in which shards store them."""

    fields: tuple[Field, ...]
    """Features first, then labels, then the weight."""
    float_dtype: str = "float32"
    """numpy dtype in which floating-point fields are stored."""

    def columns(self) -> tuple[str, ...]:
        """Return every DataFrame column needed, without repeats, in order."""
        return tuple(dict.fromkeys(column for field in self.fields for column in field.columns))

    def with_seen(self, seen: Mapping[str, tuple[str, tuple[int, ...]]]) -> Schema:
        """Return the schema with dtype and row shape of the named fields fixed.

        Args:
            seen: field name to (numpy dtype, row shape); fields left out stay as they are.

        Raises:
            DataError: a field is unknown, or was fixed to another dtype or shape before.
        """
        if unknown := set(seen) - {field.name for field in self.fields}:
            raise DataError(
                f"fields {sorted(unknown)} are not in the schema {[field.name for field in self.fields]}: "
                "the rows were ingested with other column settings; ingest them again"
            )
        return replace(self, fields=tuple(_fix(field, seen.get(field.name)) for field in self.fields))

    def to_json(self) -> dict[str, Any]:
        """Return JSON values from which `from_json` makes an equal schema."""
        return {"float_dtype": self.float_dtype, "fields": [asdict(field) for field in self.fields]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Schema:
        """Make the schema that `to_json` described.

        Raises:
            DataError: it is not a schema, or has a field without columns.
        """
        if complaint := misfit(_StoredSchema, value):
            raise DataError(f"a stored schema is damaged: {complaint}")
        fields = []
        for stored in value["fields"]:
            shape = stored.get("shape")
            field = {
                **stored,
                "columns": stored.get("columns"),
                "shape": tuple(shape) if type(shape) is list else shape,
            }
            if type(field["columns"]) is list:
                field["columns"] = tuple(field["columns"])
            if complaint := misfit(Field, field):
                raise DataError(f"a stored schema is damaged: {complaint}")
            fields.append(_plain(Field(**field)))
        return cls(fields=tuple(fields), float_dtype=value["float_dtype"])


@dataclass(frozen=True, kw_only=True)
class _StoredSchema:
    """The form of what `Schema.to_json` returns."""

    fields: list[dict[str, Any]]
    float_dtype: Literal["float32", "float64"]


_NUMPY: Final = re.compile(r"decoded|bool|u?int(8|16|32|64)|float(16|32|64|128)")
_LONGEST_NAME: Final = 200  # of a file is 255


def _plain(field: Field) -> Field:
    """Return a stored field if its name can name a file, and its dtype and shape can be an array's."""
    named = all(part.isidentifier() for part in field.name.split(".")) and len(field.name.encode()) <= _LONGEST_NAME
    # No row has more bytes than a disk holds; this keeps the sizes that are computed from overflowing.
    shaped = all(size >= 0 for size in field.shape or ()) and math.prod(field.shape or ()) < 1 << 48
    if not named or not shaped or not _NUMPY.fullmatch(field.dtype) or len(field.shape or ()) > 32:
        raise DataError(
            f"a stored schema is damaged: field {field.name[:200]!r} of {field.dtype[:200]!r} {field.shape}"
        )
    return field


def _fix(field: Field, seen: tuple[str, tuple[int, ...]] | None) -> Field:
    if seen is None:
        return field
    dtype, shape = seen[0], tuple(seen[1])
    if (field.dtype not in ("decoded", dtype)) or (field.shape is not None and field.shape != shape):
        raise DataError(
            f"field {field.name!r} (columns {list(field.columns)}) holds rows of {dtype} {shape}, but earlier rows "
            f"were {field.dtype} {field.shape}: all rows must agree; pad or cut them to one shape in Spark"
        )
    return replace(field, dtype=dtype, shape=shape)


def build_schema(
    *,
    types: Mapping[str, ColumnType],
    feature_cols: ColumnNames,
    label_cols: ColumnNames | None,
    weight_col: str | None,
    float_dtype: str = "float32",
    decode: Callables = None,
    collate: Callables = None,
) -> Schema:
    """Check the column settings against the DataFrame's types and lay out the fields.

    Args:
        types: every column of the DataFrame that can be trained on.
        feature_cols: a name (natural shape), a list of names (laid side by side, (B, k)), or a dict from an argument
            of `forward` to either.
        label_cols: the same forms, or None.
        weight_col: a numeric column of row weights, or None.
        float_dtype: "float32" or "float64", for fields with any floating-point column.
        decode: for binary columns, bytes to array: one callable, or one per column.
        collate: for array columns whose rows differ in length, list of 1-d tensors to tensor: one callable, or one
            a column.

    Raises:
        DataError: a column is missing.
        ConfigError: the settings contradict each other or the types.
    """
    if float_dtype not in ("float32", "float64"):
        raise ConfigError(f"float_dtype={float_dtype!r}: rows are stored as 'float32' or 'float64'; pass one of these")
    layouts = _layouts("features", "feature_cols", feature_cols)
    if label_cols is not None:
        layouts += _layouts("label", "label_cols", label_cols)
    if weight_col is not None:
        if not isinstance(weight_col, str):
            raise ConfigError(f"weight_col={weight_col!r}: one column name is needed, or None")
        layouts.append(Field(name="weight", role="weight", argument=None, columns=(weight_col,), **_UNKNOWN))
    used = list(dict.fromkeys(column for field in layouts for column in field.columns))
    for column in used:
        if column not in types:
            raise DataError(
                f"column {column!r} is not among the {len(types)} usable columns of the DataFrame"
                f"{_similar(column, types)}; name an existing column"
            )
    _check_callables("decode", decode, used, types, "binary")
    _check_callables("collate", collate, used, types, "array")
    fields = tuple(_typed(field, types, float_dtype, decode, collate) for field in layouts)
    return Schema(fields=fields, float_dtype=float_dtype)


def callable_for(column: str, given: Callables) -> Callable[..., Any] | None:
    """Return the callable for a column from a setting that is one callable, one per column, or None."""
    return given.get(column) if isinstance(given, Mapping) else given


def names_in(columns: ColumnNames | None) -> list[str]:
    """Return every column that a setting names, in order."""
    if columns is None:
        return []
    if isinstance(columns, str):
        return [columns]
    values = columns.values() if isinstance(columns, Mapping) else columns
    return [name for value in values for name in ([value] if isinstance(value, str) else value)]


# A field's values before the types of its columns are known.
_UNKNOWN: dict[str, Any] = {"stacked": False, "dtype": "decoded", "ragged": False}


def _layouts(role: Role, setting: str, given: ColumnNames) -> list[Field]:
    if not isinstance(given, Mapping):
        settings = {**_UNKNOWN, "stacked": not isinstance(given, str)}
        return [Field(name=role, role=role, argument=None, columns=_names(setting, given), **settings)]
    if not given:
        raise ConfigError(f"{setting}={{}}: at least one column is needed; name one")
    fields = []
    for key, names in given.items():
        if not (isinstance(key, str) and key.isidentifier()):
            raise ConfigError(
                f"{setting} has the key {key!r}: keys name arguments and must be Python identifiers; rename it"
            )
        columns = _names(f"{setting}[{key!r}]", names)
        settings = {**_UNKNOWN, "stacked": not isinstance(names, str)}
        fields.append(Field(name=f"{role}.{key}", role=role, argument=key, columns=columns, **settings))
    return fields


def _names(setting: str, given: str | Sequence[str]) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{setting}={given!r}: a column name, a list of names or a dict of these is needed")
    if not names:
        raise ConfigError(f"{setting}={given!r}: at least one column is needed; name one")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{setting} names {repeated} more than once: remove the repeats")
    return tuple(names)


def _similar(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" (similar: {', '.join(map(repr, close))})" if close else ""


def _check_callables(
    setting: str, given: Callables, used: Sequence[str], types: Mapping[str, ColumnType], kind: ColumnKind
) -> None:
    if given is None:
        return
    for key, function in given.items() if isinstance(given, Mapping) else [(None, given)]:
        if not callable(function):
            raise ConfigError(f"{setting}={given!r}: a callable, or a dict from column name to callable, is needed")
        if key is not None and key not in used:
            raise ConfigError(
                f"{setting} names the column {key!r}, which no field uses{_similar(key, used)}; remove or correct it"
            )
        if key is not None and types[key].kind != kind:
            raise ConfigError(
                f"{setting} names the column {key!r} of kind {types[key].kind}: it is for {kind} columns; remove it"
            )


def _typed(
    field: Field, types: Mapping[str, ColumnType], float_dtype: str, decode: Callables, collate: Callables
) -> Field:
    kinds = {column: types[column].kind for column in field.columns}
    for column, kind in kinds.items():
        if kind == "binary" and callable_for(column, decode) is None:
            raise ConfigError(
                f"column {column!r} holds bytes: pass decode=, a function from bytes to a numpy array, to train on it"
            )
    if field.role == "weight":
        if set(kinds.values()) != {"scalar"}:
            raise ConfigError(
                f"weight_col={field.columns[0]!r} is of kind {kinds[field.columns[0]]}: one number a row is needed"
            )
        return replace(field, dtype=float_dtype, shape=())
    if "binary" in kinds.values():
        if len(field.columns) > 1:
            raise ConfigError(
                f"{field.name} lists the binary column with others, {list(field.columns)}: decoded arrays keep "
                "their own shape; give each its own key in a dict"
            )
        return field
    ragged = any(kind == "array" and callable_for(column, collate) is not None for column, kind in kinds.items())
    if ragged and len(field.columns) > 1:
        raise ConfigError(
            f"{field.name} lays the columns {list(field.columns)} side by side, which arrays of different length "
            "(collate=) cannot be; give each such column its own key in a dict"
        )
    elements = {types[column].dtype for column in field.columns}
    if any(element.startswith("float") for element in elements):
        dtype = float_dtype
    else:
        dtype = "bool" if elements == {"bool"} else "int64"
    scalar = set(kinds.values()) == {"scalar"}
    shape: tuple[int, ...] | None = None
    if ragged:
        shape = ()
    elif scalar:
        shape = (len(field.columns),) if field.stacked else ()
    return replace(field, dtype=dtype, ragged=ragged, shape=shape)
