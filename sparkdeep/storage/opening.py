"""A folder by its path or URI (disk, object store, HDFS) behind one small interface; what only Arrow opens stands here."""

from __future__ import annotations

import errno
import re
import secrets
from collections.abc import Callable
from typing import Any, final
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs as pafs

from sparkdeep.errors import ConfigError
from sparkdeep.storage.local import LocalStore
from sparkdeep.storage.s3 import boto3_at_hand, open_s3
from sparkdeep.storage.store import JSON, TEMPORARY, Bytes, Store, check_name, shown_uri, too_long

__all__ = ["JSON", "ArrowStore", "Bytes", "Store", "check_name", "open_store"]

# There a put is all or nothing and a rename is a copy, so that a temporary name would double the cost for nothing.
_OBJECT_STORES = frozenset({"s3", "gcs", "abfs"})
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")


def open_store(uri: str, *, fallback: Callable[[str], Store] | None = None) -> Store:
    """Return the store at `uri`: a local path, file:, s3: over boto3, or what pyarrow opens (s3, gs, hdfs, abfs ...).

    Without boto3 (`pip install sparkdeep[s3]`) pyarrow opens s3: too, but without a conditional put. A URI that pyarrow
    cannot open goes to `fallback` (Spark's Hadoop file systems, where there is a session).

    Raises:
        ConfigError: pyarrow cannot open it and there is no fallback.
    """
    if not uri or "\0" in uri:
        raise ConfigError(f"{uri!r} is no folder: give a local path or a URI such as s3://bucket/folder")
    scheme = _SCHEME.match(uri)
    if scheme is None:
        return LocalStore(uri)
    if scheme[1].lower() == "file":
        return LocalStore(_file_path(uri))
    if scheme[1].lower() == "s3" and boto3_at_hand():
        return open_s3(uri)
    try:
        filesystem, root = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, UnicodeEncodeError) as exc:
        if fallback is not None:
            return fallback(uri)
        shown, why = shown_uri(uri), shown_uri((str(exc).splitlines() or [type(exc).__name__])[0])
        raise ConfigError(
            f"{shown!r} cannot be opened: pyarrow says {why!r}, and without a Spark session there is no Hadoop file "
            f"system to ask; use a local path (./{shown} if it was meant as one), file:, s3://, gs://, hdfs:// or "
            "abfs://, a mounted path (/dbfs/..., /Volumes/...), or do it from Spark"
        ) from None  # pyarrow's error shows a password in the URI
    return ArrowStore(filesystem, root, uri=uri)


def _file_path(uri: str) -> str:
    rest = uri.partition(":")[2]
    host, path = rest[2:].partition("/")[::2] if rest.startswith("//") else ("", rest[1:])
    if not rest.startswith("/") or host not in {"", "localhost"}:
        raise ConfigError(f"{uri!r} names no local folder: a file URI is file:/path or file:///path")
    return "/" + unquote(path)


@final
class ArrowStore:
    """A folder of any `pyarrow.fs.FileSystem`.

    Arrow offers neither fsync nor a conditional put. Durability is what the file system gives on close. `create`
    looks and then writes, so the caller must see to it that there is one writer at a time. Where a put is not atomic
    (HDFS, disks) a file is written under a temporary name and moved.
    """

    def __init__(self, filesystem: Any, root: str, *, uri: str) -> None:
        self._fs = filesystem
        self._root = root.rstrip("/")
        self._moves = filesystem.type_name not in _OBJECT_STORES
        self.uri = shown_uri(uri)
        self.conditional = False

    def write(self, name: str, data: Bytes) -> None:
        """Put the object, or write beside it and move."""
        path = self._path(name)
        if not self._moves:
            self._put(path, data)
            return
        folder = path.rpartition("/")[0]
        temporary = f"{folder}/{TEMPORARY}{secrets.token_hex(8)}"
        self._fs.create_dir(folder, recursive=True)
        try:
            self._put(temporary, data)
            # HDFS refuses to move onto a file, so an overwrite is not atomic there.
            if self._fs.type_name == "hdfs" and self._info(path).type == pafs.FileType.File:
                self._fs.delete_file(path)
            self._fs.move(temporary, path)
        except BaseException:
            if self._info(temporary).type == pafs.FileType.File:
                self._fs.delete_file(temporary)
            raise

    def create(self, name: str, data: Bytes) -> bool:
        """Write unless the name is there: two steps, not one."""
        if self._info(self._path(name)).type != pafs.FileType.NotFound:
            return False
        self.write(name, data)
        return True

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """Read an object whole."""
        path = self._path(name)
        info = self._info(path)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        if max_bytes is not None and info.size > max_bytes:
            raise too_long(path, info.size, max_bytes)
        with self._fs.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())

    def list(self, prefix: str) -> list[str]:
        """List recursively; unfinished files are left out."""
        top = self._path(prefix) if prefix else self._root
        infos = self._fs.get_file_info(pafs.FileSelector(top, allow_not_found=True, recursive=True))
        paths = [info.path for info in infos if info.type == pafs.FileType.File]
        start = len(self._root) + 1
        return sorted(path[start:] for path in paths if not path.rpartition("/")[2].startswith(TEMPORARY))

    def delete(self, prefix: str) -> None:
        """Remove an object, or a folder's whole tree."""
        path = self._path(prefix)
        kind = self._info(path).type
        if kind == pafs.FileType.Directory:
            self._fs.delete_dir(path)
        elif kind != pafs.FileType.NotFound:
            self._fs.delete_file(path)

    def _path(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}"

    def _info(self, path: str) -> Any:
        return self._fs.get_file_info([path])[0]

    def _put(self, path: str, data: Bytes) -> None:
        # Arrow would otherwise compress and decompress by the file name's suffix.
        with self._fs.open_output_stream(path, compression=None) as stream:
            stream.write(data)
