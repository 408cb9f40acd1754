"""The interface of a folder of named byte strings, and the rule for names."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from sparkdeep.errors import ConfigError

__all__ = ["JSON", "TEMPORARY", "Bytes", "Store", "check_name", "run_folder", "shown_uri", "too_long"]

Bytes: TypeAlias = bytes | bytearray | memoryview
JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

TEMPORARY = ".tmp-"  # prefix of unfinished files: no caller may use it, no list() shows it

_PASSWORD = re.compile(r"//[^@\s]*:[^@\s]*@")


def run_folder(run: str) -> str:
    """A run's folder, in a directory that runs share."""
    return f"sparkdeep-{run}"


class Store(Protocol):
    """A folder of named byte strings. Names are relative, with "/" between their parts; bad ones raise ConfigError.

    Failures of the storage itself raise OSError.
    """

    @property
    def uri(self) -> str:
        """Where the folder is, for messages; a password in it is blanked."""

    @property
    def conditional(self) -> bool:
        """Whether `create` is atomic among writers; if not, the caller must see to it that there is only one."""

    def write(self, name: str, data: Bytes) -> None:
        """Store `data` under `name`, replacing what is there; durable on return, whole or not at all."""

    def create(self, name: str, data: Bytes) -> bool:
        """Store `data` only if `name` is absent; False if it exists. Durable on return."""

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """Return the bytes of `name`; FileNotFoundError if absent.

        A file longer than `max_bytes` is refused before memory is taken: OSError with errno EFBIG.
        """

    def list(self, prefix: str) -> list[str]:
        """Return the names of all files under the folder `prefix` ("" for all), sorted; [] if absent."""

    def delete(self, prefix: str) -> None:
        """Remove the file `prefix`, or everything under the folder `prefix`; absent is fine."""


def check_name(name: str) -> str:
    """Return `name` if it stays inside its folder, else raise ConfigError."""
    parts = name.split("/")
    bad = not name or "\\" in name or "\0" in name or any(part in {"", ".", ".."} for part in parts)
    if bad or any(part.startswith(TEMPORARY) for part in parts):
        raise ConfigError(
            f"{name!r} is no name in a store: names are relative, with parts between single '/', none of them "
            f"empty, '.', '..' or beginning with {TEMPORARY!r}, and without backslash or NUL; choose such a name"
        )
    return name


def shown_uri(uri: str) -> str:
    """Return `uri` for messages: a password in it is blanked."""
    return _PASSWORD.sub("//***@", uri)


def too_long(name: str, num_bytes: int, max_bytes: int) -> OSError:
    """Return the error for a file of `num_bytes` where at most `max_bytes` were expected."""
    return OSError(errno.EFBIG, f"{num_bytes} bytes where at most {max_bytes} were expected", name)
