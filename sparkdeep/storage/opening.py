"""A folder somewhere (disk, object store, HDFS) behind one small interface: bytes in, bytes out, by relative name."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs as pafs

from sparkdeep.errors import ConfigError
from sparkdeep.storage.arrow import ArrowStore
from sparkdeep.storage.local import LocalStore
from sparkdeep.storage.s3 import boto3_at_hand, open_s3
from sparkdeep.storage.store import JSON, Bytes, Store, check_name, shown_uri

__all__ = ["JSON", "Bytes", "Store", "check_name", "open_store"]

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
