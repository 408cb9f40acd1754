"""One partition's rows on disk: plain column files, written once, read through memory maps."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, final

import numpy as np

from sparkdeep.checks import misfit, shown
from sparkdeep.data.arrow import Array, FieldValues, Ragged
from sparkdeep.data.sample import decode_rows, encode_rows
from sparkdeep.data.schema import Schema
from sparkdeep.data.shard_maps import SPLITS, StoredShard, open_field, own_files, will_need
from sparkdeep.errors import DataError

__all__ = ["SPLITS", "FieldValues", "Shard", "ShardInfo", "ShardWriter", "decode_rows", "encode_rows"]

_MANIFEST: Final = "shard.json"
_FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What a finished shard holds."""

    rows: dict[str, int]
    """Rows of each split."""
    digest: str
    """Over every value in row order, with names, dtypes and shapes; it does not depend on how the rows were batched."""
    seen: dict[str, tuple[str, tuple[int, ...]]]
    """Field to (numpy dtype, row shape); a field that no row has fixed is left out."""
    num_bytes: int
    """Size of all column files together, in bytes."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values from which `from_json` makes an equal object."""
        return {**asdict(self), "seen": {name: [dtype, list(shape)] for name, (dtype, shape) in self.seen.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ShardInfo:
        """Make the object that `to_json` described.

        Raises:
            DataError: it is none.
        """
        seen: Any = value.get("seen")
        if isinstance(seen, dict) and all(isinstance(pair, list) and len(pair) == 2 for pair in seen.values()):
            seen = {
                name: (dtype, tuple(shape) if type(shape) is list else shape) for name, (dtype, shape) in seen.items()
            }
        complaint = misfit(cls, {**value, "seen": seen})
        if complaint is None and (value["rows"].keys() != set(SPLITS) or min(value["rows"].values()) < 0):
            complaint = f"rows of {shown(value['rows'])}"
        if complaint:
            raise DataError(f"what a shard says of itself is damaged: {complaint}")
        return cls(rows=dict(value["rows"]), digest=value["digest"], seen=seen, num_bytes=value["num_bytes"])


class _Column:
    """One growing file and the digest of what it holds."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        self.file: IO[bytes] = os.fdopen(descriptor, "wb", buffering=1 << 20)
        self.name = path.name
        # The fastest strong hash where the processor has instructions for it, as all have since about 2020: it takes
        # half of blake2b's time, and still it is most of what writing a shard costs.
        self.hash = hashlib.sha256()
        self.num_bytes = 0

    def append(self, values: Array) -> None:
        data = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        view = data.reshape(-1).view(np.uint8).data
        self.file.write(view)
        self.hash.update(view)
        self.num_bytes += data.nbytes


@final
class ShardWriter:
    """Writes a shard; it exists for readers once `close` has returned.

    Files are private to the user (0600 in a 0700 folder). As a context manager it closes its files on the way out and
    leaves a shard that was not finished unreadable.
    """

    def __init__(self, directory: Path, schema: Schema) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        (directory / _MANIFEST).unlink(missing_ok=True)
        self._directory = directory
        self._schema = schema
        self._rows = dict.fromkeys(SPLITS, 0)
        self._columns: dict[tuple[str, str, str], _Column] = {}
        self._elements: dict[tuple[str, str], int] = {}  # values of a ragged field so far

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for column in self._columns.values():
            try:
                column.file.close()
            except OSError:
                if kind is None:
                    raise  # otherwise a full disk has ended the shard already

    def append(self, split: str, fields: Mapping[str, FieldValues]) -> None:
        """Add rows at the end of a split.

        Args:
            split: one of SPLITS.
            fields: every field of the schema, (rows, *shape) or Ragged; 0 rows add nothing and fix nothing.

        Raises:
            DataError: a field's rows have another dtype or shape than those before.
            OSError: the disk is full, or a file cannot be written.
        """
        assert split in SPLITS, f"{split!r} is not one of {SPLITS}"
        counts = {field.name: _num_rows(fields[field.name]) for field in self._schema.fields}
        rows = next(iter(counts.values()))
        assert set(counts.values()) == {rows}, f"fields of one batch differ in rows: {counts}"
        if rows == 0:
            return
        self._schema = self._schema.with_seen({name: _dtype_and_shape(fields[name]) for name in counts})
        for name in counts:
            value = fields[name]
            if isinstance(value, Ragged):
                self._append_ragged(split, name, value)
            else:
                self._column(split, name, "").append(value)
        self._rows[split] += rows

    def close(self) -> ShardInfo:
        """Finish the shard: everything is on disk before its manifest gets its name.

        Raises:
            OSError: the disk is full, or a file cannot be written.
        """
        for column in self._columns.values():
            column.file.close()
        known = [field for field in self._schema.fields if field.dtype != "decoded" and field.shape is not None]
        info = ShardInfo(
            rows=dict(self._rows),
            digest=self._digest(),
            seen={field.name: (field.dtype, field.shape or ()) for field in known},
            num_bytes=sum(column.num_bytes for column in self._columns.values()),
        )
        manifest = {
            "format": _FORMAT,
            "info": info.to_json(),
            "schema": self._schema.to_json(),
            "files": {column.name: column.num_bytes for column in self._columns.values()},
        }
        unnamed = self._directory / f"{_MANIFEST}.{os.getpid()}.tmp"
        with os.fdopen(os.open(unnamed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(manifest, file)
        unnamed.replace(self._directory / _MANIFEST)
        return info

    def _column(self, split: str, name: str, part: str) -> _Column:
        key = (split, name, part)
        if key not in self._columns:
            self._columns[key] = _Column(self._directory / f"{split}.{name}{part}.bin")
        return self._columns[key]

    def _append_ragged(self, split: str, name: str, value: Ragged) -> None:
        start = self._elements.get((split, name), 0)
        offsets = start + np.cumsum(value.lengths, dtype=np.int64)
        if self._rows[split] == 0:
            offsets = np.concatenate([np.zeros(1, np.int64), offsets])
        self._column(split, name, ".values").append(value.values)
        self._column(split, name, ".offsets").append(offsets)
        self._elements[split, name] = int(offsets[-1])

    def _digest(self) -> str:
        parts: list[Any] = [sorted(self._rows.items())]
        parts += [[field.name, field.dtype, field.shape, field.ragged] for field in self._schema.fields]
        parts += [[*key, column.hash.hexdigest()] for key, column in sorted(self._columns.items())]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@final
class Shard:
    """A finished shard; rows are gathered from memory maps, so it may be larger than memory."""

    def __init__(self, info: ShardInfo, schema: Schema, maps: dict[tuple[str, str], FieldValues]) -> None:
        """Keep the parts that `open` has checked.

        Args:
            info: what the shard holds.
            schema: with dtypes and shapes fixed.
            maps: (split, field) to the mapped column; of ragged fields the values and the offsets, (rows + 1,).
        """
        self.info = info
        self.schema = schema
        self._columns = {split: [(field.name, maps[split, field.name]) for field in schema.fields] for split in SPLITS}

    @classmethod
    def open(cls, directory: Path) -> Shard:
        """Map the shard in a folder.

        Every file's size is checked first: touching a map beyond the end of its file kills the process.

        Raises:
            DataError: the shard was not finished, is of another format, or a file is missing or has another size.
        """
        remedy = "it must be ingested again"
        try:
            manifest = json.loads((directory / _MANIFEST).read_bytes())
            if complaint := misfit(StoredShard, manifest):
                raise DataError(f"shard {directory} has a damaged {_MANIFEST} ({complaint}): {remedy}")
            if manifest["format"] != _FORMAT:
                raise DataError(f"shard {directory} has format {manifest['format']}, not {_FORMAT}: {remedy}")
            info = ShardInfo.from_json(manifest["info"])
            schema = Schema.from_json(manifest["schema"])
            sizes = own_files(manifest["files"], schema)
        except FileNotFoundError:
            raise DataError(f"shard {directory} has no {_MANIFEST}, so it was not finished: {remedy}") from None
        except (ValueError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"shard {directory} has a damaged {_MANIFEST} ({error!r}): {remedy}") from error
        for name, size in sizes.items():
            path = directory / name
            actual = path.stat().st_size if path.is_file() else None
            if actual != size:
                found = "is missing" if actual is None else f"has {actual} bytes"
                raise DataError(f"shard file {path} {found} where {size} bytes were written: {remedy}")
        maps: dict[tuple[str, str], FieldValues] = {}
        for split in SPLITS:
            for field in schema.fields:
                maps[split, field.name] = open_field(directory, split, field, info.rows[split], sizes)
        return cls(info, schema, maps)

    def take(self, split: str, indices: Array) -> dict[str, FieldValues]:
        """Gather rows into fresh, writable arrays.

        Args:
            split: one of SPLITS.
            indices: (n,) integers from 0 to the split's rows - 1, in any order, repeats allowed.

        Raises:
            IndexError: an index lies outside the split.
        """
        rows = self.info.rows[split]
        # As unsigned numbers the negative ones are the largest, so that one comparison checks both ends.
        if len(indices) and int(indices.astype(np.uint64).max()) >= rows:
            raise IndexError(
                f"indices from {indices.min()} to {indices.max()} reach outside the {rows} rows of {split}"
            )
        return self.gather(split, indices, _as_run(indices))

    def gather(self, split: str, indices: Array, run: slice | None = None) -> dict[str, FieldValues]:
        """Like `take`, without checking the indices: for a small gather the check costs half as much as the gather.

        Args:
            split: one of SPLITS.
            indices: (n,) integers, none of them negative.
            run: the same rows as a slice, where they are consecutive.

        Raises:
            IndexError: an index lies beyond the split's end.
        """
        out: dict[str, FieldValues] = {}
        for name, column in self._columns[split]:
            if isinstance(column, Ragged):
                out[name] = _take_ragged(column, indices, run)
            else:
                # A slice must be copied explicitly; `take` gathers rows in two thirds of the time that indexing with an
                # array needs.
                out[name] = column[run].copy() if run is not None else column.take(indices, 0)
        return out

    def head(self, n: int) -> dict[str, FieldValues]:
        """Return the first `n` rows of train, or all if there are fewer."""
        return self.take("train", np.arange(min(n, self.info.rows["train"])))

    def will_need(self, split: str, start: int, stop: int) -> None:
        """Ask the system to read rows [start, stop) from disk before they are used; returns before it has done so."""
        for _, column in self._columns[split]:
            if not isinstance(column, Ragged):
                will_need(column, start, stop)
                continue
            values, offsets = column
            will_need(offsets, start, stop + 1)
            will_need(values, int(offsets[start]), int(offsets[stop]))

    def close(self) -> None:
        """Let go of the maps; arrays that `take` returned stay valid."""
        self._columns = {}


def _num_rows(value: FieldValues) -> int:
    return len(value.lengths) if isinstance(value, Ragged) else len(value)


def _dtype_and_shape(value: FieldValues) -> tuple[str, tuple[int, ...]]:
    return (value.values.dtype.name, ()) if isinstance(value, Ragged) else (value.dtype.name, value.shape[1:])


def _as_run(indices: Array) -> slice | None:
    """Return consecutive ascending indices as a slice: one copy of a stretch is cheaper than a gather."""
    if len(indices) == 0 or int(indices[-1]) - int(indices[0]) != len(indices) - 1 or (np.diff(indices) != 1).any():
        return None
    return slice(int(indices[0]), int(indices[-1]) + 1)


def _take_ragged(column: Ragged, indices: Array, run: slice | None) -> Ragged:
    values, offsets = column
    if run is not None:
        bounds = offsets[run.start : run.stop + 1]
        return Ragged(values[int(bounds[0]) : int(bounds[-1])].copy(), np.diff(bounds))
    starts, lengths = offsets[indices], offsets[indices + 1] - offsets[indices]
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return Ragged(values[np.repeat(starts, lengths) + within], lengths)
