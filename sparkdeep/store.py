"""A folder somewhere (disk, object store, HDFS) behind one small interface: bytes in, bytes out, by relative name."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, final
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs as pafs

from sparkdeep.errors import ConfigError
from sparkdeep.s3 import boto3_at_hand, open_s3
from sparkdeep.store_protocol import JSON, TEMPORARY, Bytes, Store, check_name, shown_uri, too_long

__all__ = ["JSON", "ArrowStore", "Bytes", "LocalStore", "Store", "check_name", "open_store"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")
# A put is all or nothing there and a rename is a copy, so a temporary name would cost twice and gain nothing.
_OBJECT_STORES = frozenset({"s3", "gcs", "abfs"})
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK})
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


@final
class LocalStore:
    """A folder on a mounted file system; files 0600 in folders 0700, made when first written.

    Symbolic links below the folder are never followed (OSError with errno ELOOP). Where the file system has no
    hard links, `create` checks and then renames, and `conditional` turns False.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root).absolute()
        self.uri = str(self._root)
        self.conditional = True

    def write(self, name: str, data: Bytes) -> None:
        """Replace by rename of a synced temporary file, then sync the folder."""
        path = self._path(name)
        temporary = self._write_temporary(path.parent, data)
        try:
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)

    def create(self, name: str, data: Bytes) -> bool:
        """Link a synced temporary file to its name, which fails if the name exists; then sync the folder."""
        path = self._path(name)
        if path.exists():
            return False
        temporary = self._write_temporary(path.parent, data)
        try:
            try:
                path.hardlink_to(temporary)
            except FileExistsError:
                # A network file system may repeat a request that had succeeded: then the name is our own file.
                if not path.samefile(temporary):
                    return False
            except OSError as exc:
                if exc.errno not in _NO_HARD_LINKS:
                    raise
                self.conditional = False
                temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
        return True

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """Read a regular file whole."""
        path = self._path(name)
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if max_bytes is not None and num_bytes > max_bytes:
                raise too_long(str(path), num_bytes, max_bytes)
            return file.read(num_bytes)

    def list(self, prefix: str) -> list[str]:
        """Walk the folder; links and unfinished files are left out."""
        top = self._path(prefix) if prefix else self._root
        names = []
        for folder, _, files in os.walk(top):
            paths = (Path(folder) / file for file in files if not file.startswith(TEMPORARY))
            names += [path.relative_to(self._root).as_posix() for path in paths if not path.is_symlink()]
        return sorted(names)

    def delete(self, prefix: str) -> None:
        """Remove a file, a link itself, or a folder's whole tree."""
        path = self._root / check_name(prefix)
        self._refuse_links(path.parent)
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            _sync_folder(path.parent)

    def _path(self, name: str) -> Path:
        path = self._root / check_name(name)
        self._refuse_links(path)
        return path

    def _refuse_links(self, path: Path) -> None:
        if path.resolve() != self._root.resolve() / path.relative_to(self._root):
            raise OSError(errno.ELOOP, "a symbolic link below the folder is not followed", str(path))

    def _write_temporary(self, folder: Path, data: Bytes) -> Path:
        _make_folders(folder)
        path = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path


@final
class ArrowStore:
    """A folder of any `pyarrow.fs.FileSystem`.

    Arrow offers neither fsync nor a conditional put: durability is what the file system gives on close, `create`
    looks and then writes, and so one writer at a time is the caller's duty. Where a put is not whole by itself
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
        # Arrow would otherwise compress and decompress by the name's ending.
        with self._fs.open_output_stream(path, compression=None) as stream:
            stream.write(data)


def open_store(uri: str, *, fallback: Callable[[str], Store] | None = None) -> Store:
    """Return the store at `uri`: a local path, file:, s3: over boto3, or what pyarrow opens (s3, gs, hdfs, abfs ...).

    Without boto3 (`pip install sparkdeep[s3]`) pyarrow opens s3: too, but has no conditional put to offer. A URI that pyarrow cannot open goes to `fallback` (Spark's Hadoop file systems, where there is a session).

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


def _make_folders(folder: Path) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(mode=0o700, exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        # Some mounted object stores cannot sync a folder; they keep no folders that could be lost either.
        if exc.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
