"""A store on a mounted file system: whole files, private to their user, synced before they count."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path
from typing import final

from sparkdeep.storage.store import TEMPORARY, Bytes, check_name, too_long

__all__ = ["LocalStore"]


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
                # A network file system may repeat a request that had already succeeded: then the existing file is our
                # own.
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
        files = (Path(folder) / name for folder, _, names in os.walk(top) for name in names)
        paths = (path for path in files if not path.name.startswith(TEMPORARY) and not path.is_symlink())
        return sorted(path.relative_to(self._root).as_posix() for path in paths)

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
        for new in reversed([one for one in (folder, *folder.parents) if not one.exists()]):
            new.mkdir(mode=0o700, exist_ok=True)
            _sync_folder(new.parent)
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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        # Some mounted object stores cannot sync a folder; they have no folders that could be lost, either.
        if exc.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
