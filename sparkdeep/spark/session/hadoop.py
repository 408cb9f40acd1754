"""A store through Spark's own Hadoop file systems: whatever the session can open, with its credentials."""

from __future__ import annotations

import contextlib
import errno
import secrets
from collections.abc import Iterator
from typing import Any, final

from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

from sparkdeep.errors import ConfigError
from sparkdeep.storage.store import TEMPORARY, Bytes, check_name, shown_uri, too_long

__all__ = ["HadoopStore"]

CHUNK_BYTES = 8 << 20  # py4j holds each message several times over, as text
_CREATES_ATOMICALLY = frozenset({"hdfs", "viewfs", "abfs", "abfss", "gs"})  # create(overwrite=false) is one operation


@final
class HadoopStore:
    """A folder of any Hadoop file system (s3a, dbfs, abfss, wasb, hdfs ...) on the driver's JVM.

    An overwrite removes the old file just before the new one takes its name. A file made by `create` appears before
    it is complete: a reader that comes too early, or after a crash, finds it truncated.

    Raises:
        ConfigError: the session has no JVM at hand (Spark Connect), or it cannot open `uri`.
    """

    def __init__(self, spark: SparkSession, uri: str) -> None:
        self.uri = shown_uri(uri)
        jvm = getattr(spark, "_jvm", None)
        if jvm is None:
            raise ConfigError(
                f"{self.uri!r} needs Spark's Hadoop file systems, and this session (Spark Connect) has no JVM at hand; "
                "use a path that pyarrow opens: local or mounted, s3://, gs://, abfs://"
            )
        self._make_path = jvm.org.apache.hadoop.fs.Path
        try:
            root = self._make_path(uri)
            self._fs = root.getFileSystem(spark._jsc.hadoopConfiguration())
            self._root = self._fs.makeQualified(root)
        except Py4JJavaError as exc:
            raise ConfigError(
                f"{self.uri!r} cannot be opened by Spark: {_message(exc)}; add the file system's package to "
                "spark.jars.packages and its credentials to spark.hadoop.*, or use another folder"
            ) from exc
        self.conditional = str(self._root.toUri().getScheme()) in _CREATES_ATOMICALLY

    def write(self, name: str, data: Bytes) -> None:
        """Write beside the name, then rename."""
        path = self._path(name)
        temporary = self._make_path(path.getParent(), f"{TEMPORARY}{secrets.token_hex(8)}")
        with _java_errors(name):
            try:
                self._put(temporary, data, overwrite=False)
                self._fs.delete(path, False)  # HDFS refuses to rename onto a file
                if not self._fs.rename(temporary, path):
                    raise OSError(errno.EIO, "the file system refused the rename", name)
            except BaseException:
                self._fs.delete(temporary, False)
                raise

    def create(self, name: str, data: Bytes) -> bool:
        """Create without overwriting; removes what a failed attempt began."""
        path = self._path(name)
        with _java_errors(name):
            if self._fs.exists(path):
                return False
            try:
                self._put(path, data, overwrite=False)
            except FileExistsError:
                return False
        return True

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """Read a file whole, a chunk at a time."""
        path = self._path(name)
        with _java_errors(name):
            status = self._fs.getFileStatus(path)
            if not status.isFile():
                raise FileNotFoundError(errno.ENOENT, "no such file", name)
            if max_bytes is not None and status.getLen() > max_bytes:
                raise too_long(name, status.getLen(), max_bytes)
            stream = self._fs.open(path)
            try:
                return b"".join(iter(lambda: bytes(stream.readNBytes(CHUNK_BYTES)), b""))
            finally:
                stream.close()

    def list(self, prefix: str) -> list[str]:
        """List recursively; unfinished files are left out."""
        start = len(self._root.toUri().getPath().rstrip("/")) + 1
        names = []
        try:
            with _java_errors(prefix):
                found = self._fs.listFiles(self._path(prefix) if prefix else self._root, True)
                while found.hasNext():
                    names.append(found.next().getPath().toUri().getPath()[start:])
        except FileNotFoundError:
            return []
        return sorted(name for name in names if not name.rpartition("/")[2].startswith(TEMPORARY))

    def delete(self, prefix: str) -> None:
        """Remove a file or a folder's whole tree."""
        with _java_errors(prefix):
            self._fs.delete(self._path(prefix), True)

    def _path(self, name: str) -> Any:
        return self._make_path(self._root, check_name(name))

    def _put(self, path: Any, data: Bytes, *, overwrite: bool) -> None:
        with _java_errors(str(path.getName())):
            stream = self._fs.create(path, overwrite)
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), CHUNK_BYTES):
                stream.write(bytearray(view[start : start + CHUNK_BYTES]))
            if stream.hasCapability("hsync"):
                stream.hsync()
            stream.close()
        except BaseException:
            try:
                stream.close()
            finally:  # closing completes a file, so one that is cut short is removed at once
                self._fs.delete(path, False)
            raise


@contextlib.contextmanager
def _java_errors(name: str) -> Iterator[None]:
    """Turn Java's file errors into Python's."""
    try:
        yield
    except Py4JJavaError as exc:
        kind = str(exc.java_exception.getClass().getSimpleName())
        if kind == "FileNotFoundException":
            raise FileNotFoundError(errno.ENOENT, "no such file", name) from exc
        if kind == "FileAlreadyExistsException":
            raise FileExistsError(errno.EEXIST, "file exists", name) from exc
        raise OSError(errno.EIO, _message(exc), name) from exc


def _message(exc: Py4JJavaError) -> str:
    """Return the Java exception's own line, without its stack."""
    return str(exc.java_exception.toString()).splitlines()[0]
