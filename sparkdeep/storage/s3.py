"""A store in S3, or in any service with its protocol, through boto3: `create` is one conditional put."""

from __future__ import annotations

import contextlib
import errno
import io
from collections.abc import Iterator
from typing import Any, Final, final
from urllib.parse import parse_qsl, unquote, urlsplit

from sparkdeep.errors import ConfigError
from sparkdeep.storage.store import TEMPORARY, Bytes, check_name, shown_uri, too_long

__all__ = ["S3Store", "boto3_at_hand", "open_s3"]

_OPTIONS: Final = ("region", "scheme", "endpoint_override")
_CONNECT_TIMEOUT_S: Final = 10.0
_READ_TIMEOUT_S: Final = 60.0
_PART_BYTES: Final = 64 << 20  # larger files go in parts, which the store joins at the end or not at all
_DELETED_AT_ONCE: Final = 1000  # S3's limit
_CONFLICT_TRIES: Final = 5

_ABSENT: Final = frozenset({"NoSuchKey", "404", "NotFound"})
_EXISTS: Final = frozenset({"PreconditionFailed", "412"})
_CONFLICT: Final = frozenset({"ConditionalRequestConflict", "409"})
_UNKNOWN: Final = frozenset({"NotImplemented", "501"})
_DENIED: Final = frozenset({"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"})


def boto3_at_hand() -> bool:
    """Whether boto3 is installed here."""
    try:
        import boto3  # noqa: F401
    except ImportError:
        return False
    return True


def open_s3(uri: str) -> S3Store:
    """The store at `s3://[key:secret@]bucket/folder[?region=..&scheme=..&endpoint_override=..]`.

    Credentials and region come from the URI or from boto3's own chain (environment, ~/.aws, the machine's role).

    Raises:
        ConfigError: the URI names no bucket, has an option that is not known, or boto3 cannot make a client of it.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if not parts.hostname:
        raise ConfigError(f"{shown_uri(uri)!r} names no bucket: give s3://bucket/folder")
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise ConfigError(f"{shown_uri(uri)!r} has the options {unknown}; known: {', '.join(_OPTIONS)}")
    bucket = parts.netloc.rpartition("@")[2]
    endpoint = options.get("endpoint_override")
    if endpoint is not None and "://" not in endpoint:
        endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
    given: dict[str, Any] = {"region_name": options.get("region"), "endpoint_url": endpoint}
    if parts.username is not None:
        given |= {"aws_access_key_id": unquote(parts.username), "aws_secret_access_key": unquote(parts.password or "")}
    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        # Behind an endpoint of the user's own, bucket names are not host names.
        s3={"addressing_style": "path"} if endpoint is not None else {},
    )
    try:
        client = boto3.session.Session().client("s3", config=config, **given)
    except (BotoCoreError, ValueError) as exc:
        raise ConfigError(f"{shown_uri(uri)!r} cannot be opened: {shown_uri(str(exc))}") from None
    return S3Store(client, bucket, unquote(parts.path).strip("/"), uri=uri)


@final
class S3Store:
    """Objects below a prefix of a bucket. A put is whole or absent, and durable on return.

    `create` is a put with If-None-Match. If the store answers that it does not implement that, `conditional` turns
    False at the first one: from then on `create` looks and then writes, and the caller must see to it that there is one
    writer at a time. A store that accepts the header and ignores it cannot be recognized.
    """

    def __init__(self, client: Any, bucket: str, root: str, *, uri: str) -> None:
        self._client = client
        self._bucket = bucket
        self._root = f"{root}/" if root else ""
        self.uri = shown_uri(uri.partition("?")[0])
        self.conditional = True

    def write(self, name: str, data: Bytes) -> None:
        """Put the object; a large one in parts."""
        key = self._key(name)
        with _named_errors(name):
            if memoryview(data).nbytes <= _PART_BYTES:
                self._client.put_object(Bucket=self._bucket, Key=key, Body=bytes(data))
                return
            from boto3.s3.transfer import TransferConfig

            parts = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES)
            self._client.upload_fileobj(io.BytesIO(data), self._bucket, key, Config=parts)

    def create(self, name: str, data: Bytes) -> bool:
        """Put the object on condition that there is none."""
        content = bytes(data)
        if not self.conditional:
            return self._create_in_two_steps(name, content)
        for attempt in range(_CONFLICT_TRIES):
            with _named_errors(name):
                try:
                    self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=content, IfNoneMatch="*")
                    return True
                except self._client.exceptions.ClientError as exc:
                    code = _code(exc)
                    if code in _UNKNOWN:
                        self.conditional = False
                        return self._create_in_two_steps(name, content)
                    if code in _CONFLICT and attempt < _CONFLICT_TRIES - 1:
                        continue
                    if code not in _EXISTS:
                        raise
            # If an answer is lost, boto3 repeats a put that had already succeeded: then the existing object is our own.
            return self._is(name, content)
        raise AssertionError("unreachable")

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """Read an object whole."""
        with _named_errors(name):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(name))
            num_bytes = int(answer["ContentLength"])
            with contextlib.closing(answer["Body"]) as body:
                if max_bytes is not None and num_bytes > max_bytes:
                    raise too_long(name, num_bytes, max_bytes)
                return bytes(body.read())

    def list(self, prefix: str) -> list[str]:
        """List recursively; markers of folders and unfinished files are left out."""
        start = f"{self._root}{check_name(prefix)}/" if prefix else self._root
        names = []
        with _named_errors(prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=start):
                names += [str(item["Key"])[len(self._root) :] for item in page.get("Contents", [])]
        # Other programs may have put markers there; the marker of the folder itself has no name here.
        files = (name for name in names if name and not name.endswith("/"))
        return sorted(name for name in files if not name.rpartition("/")[2].startswith(TEMPORARY))

    def delete(self, prefix: str) -> None:
        """Remove an object, and everything below the name."""
        key = self._key(prefix)
        with _named_errors(prefix):
            self._client.delete_object(Bucket=self._bucket, Key=key)
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=f"{key}/", PaginationConfig={"PageSize": _DELETED_AT_ONCE}
            )
            for page in pages:
                if keys := [{"Key": item["Key"]} for item in page.get("Contents", [])]:
                    done = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": keys, "Quiet": True})
                    for error in done.get("Errors", [])[:1]:
                        raise OSError(errno.EIO, f"{error.get('Code')}: {error.get('Message')}", prefix)

    def _key(self, name: str) -> str:
        return self._root + check_name(name)

    def _create_in_two_steps(self, name: str, data: bytes) -> bool:
        with _named_errors(name):
            try:
                self._client.head_object(Bucket=self._bucket, Key=self._key(name))
                return False
            except self._client.exceptions.ClientError as exc:
                if _code(exc) not in _ABSENT:
                    raise
        self.write(name, data)
        return True

    def _is(self, name: str, data: bytes) -> bool:
        try:
            return self.read(name, max_bytes=len(data)) == data
        except OSError as exc:
            if exc.errno in {errno.EFBIG, errno.ENOENT}:
                return False
            raise


@contextlib.contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Turn boto3's errors into Python's; none of them shows a secret."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as exc:
        code = _code(exc)
        if code in _ABSENT:
            raise FileNotFoundError(errno.ENOENT, "no such object", name) from None
        raise OSError(errno.EACCES if code in _DENIED else errno.EIO, shown_uri(str(exc)), name) from None
    except (BotoCoreError, Boto3Error) as exc:
        raise OSError(errno.EIO, f"{type(exc).__name__}: {shown_uri(str(exc))}", name) from None


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
