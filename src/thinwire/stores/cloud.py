"""A store in a bucket: S3 and everything that speaks its protocol, Google Cloud Storage, Azure Blob Storage.

The bytes are moved by obstore. What this file adds:

- *create never retries.* obstore retries a failed request by itself; a create that succeeded but whose reply was lost
  would then find its own object and report that the key is taken. Creates therefore go through a client that sends
  each request once: ObjectExistsError means that this call wrote nothing, StoreUnavailableError that it may have. (A
  proxy on the way may still repeat a request, so a publisher that loses a key reads it back and compares.)
- *size_max comes before the bytes.* The reply's headers give the size; a larger object is not read.
- *Nothing waits for ever.* See the time-outs of :class:`CloudStore`.
- *Foreign errors end here*, as errors grouped by remedy, without credentials in their text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from typing import Any, final
from urllib.parse import urlsplit

from thinwire.errors import MisuseError, ObjectNotFoundError, StoreUnavailableError, UnsupportedError
from thinwire.stores.checks import (
    check_list,
    check_range,
    is_key,
    slices,
    too_large,
    too_short,
    views,
)
from thinwire.stores.protocol import Blob, ObjectInfo, check_key

__all__ = ["CloudStore"]

SCHEMES = ("s3", "gs", "az")
PARTS_MAX = 10_000  # of one upload, by S3
CREATE_BYTES_MAX = 5 << 30  # of one request, by S3 and Azure
_LIST_CHUNK = 1000
_RETRY_FOR_S_MAX = 240.0  # retried requests are not signed anew
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")


@final
class CloudStore:
    """Objects in a bucket, through obstore.

    Credentials come from the environment as the provider's own tools read it (``AWS_ACCESS_KEY_ID``,
    ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``;
    ``GOOGLE_APPLICATION_CREDENTIALS``; ``AZURE_STORAGE_ACCOUNT_NAME``, ``AZURE_STORAGE_ACCOUNT_KEY``), from the
    machine's own role, or from ``config``.

    Args:
        url: ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix``.
        connect_timeout_s: to open a connection.
        stall_timeout_s: until the next bytes of a reply come, and for an upload of up to ``part_bytes`` to end.
        request_timeout_s: for any one request, with all its bytes.
        retries: how often a failed request is repeated, after pauses of 0.1 s and growing. Not for ``create``.
        part_bytes: objects above this size go up in parts of this size (more for objects of over 10,000 parts).
        parts_parallel: parts on their way at once; the memory used is about their product.
        credential_provider: a callable that obstore asks for credentials, such as
            ``obstore.auth.boto3.Boto3CredentialProvider()`` for profiles and single sign-on.
        config: obstore's own settings of the provider (its ``S3Config``, ``GCSConfig``, ``AzureConfig``), among them
            ``endpoint``, ``region``, ``access_key_id``, ``secret_access_key``, ``skip_signature``.

    Raises:
        MisuseError: the URL or a setting is not one.

    >>> store = CloudStore("s3://models/run-7", endpoint="http://127.0.0.1:9000", region="us-east-1")
    >>> store.url
    's3://models/run-7'
    """

    def __init__(
        self,
        url: str,
        *,
        connect_timeout_s: float = 5.0,
        stall_timeout_s: float = 60.0,
        request_timeout_s: float = 900.0,
        retries: int = 4,
        part_bytes: int = 8 << 20,
        parts_parallel: int = 4,
        credential_provider: Callable[[], Any] | None = None,
        **config: str | bool,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES or not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
            shown = url.split("?")[0].split("@")[-1]
            raise MisuseError(f"not the URL of a bucket: {shown!r}; write s3://, gs:// or az://, bucket/prefix")
        if min(connect_timeout_s, stall_timeout_s, request_timeout_s, part_bytes, parts_parallel) <= 0 or retries < 0:
            raise MisuseError("time-outs, part_bytes and parts_parallel are above 0, retries at least 0")
        if part_bytes < 5 << 20:
            raise MisuseError(f"part_bytes is {part_bytes}; S3 takes no parts below {5 << 20}")
        self._url = url.rstrip("/")
        self._connect_timeout_s = connect_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._request_timeout_s = request_timeout_s
        self._retries = retries
        self._part_bytes = part_bytes
        self._parts_parallel = parts_parallel
        self._credential_provider = credential_provider
        if parts.scheme == "s3":  # the bulk request is missing on some servers, and we delete one by one
            config.setdefault("disable_bulk_delete", True)
        self._config = config
        with self._seam("anything", opening=True):
            _ = self._usual  # a wrong setting shows here, not at the first request

    @property
    def url(self) -> str:
        return self._url

    def get(self, key: str, *, size_max: int) -> bytes:
        check_key(key)
        with self._seam(key):
            result = self._usual.get(key)
            size = result.meta["size"]
            if size > size_max:
                raise too_large(self._url, key, size, size_max)
            return self._exactly(key, size, result)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_key(key)
        check_range(start, length)
        if length == 0:  # a range of no bytes cannot be asked for
            if start > (size := self.head(key).size):
                raise too_short(self._url, key, size, start, length)
            return b""
        with self._seam(key, asked=(start, length)):
            result = self._usual.get(key, options={"range": (start, start + length)})
            size = result.meta["size"]
            if start + length > size:
                raise too_short(self._url, key, size, start, length)
            return self._exactly(key, length, result)

    def put(self, key: str, data: Blob) -> None:
        check_key(key)
        flat = views(data)
        size = sum(map(len, flat))
        with self._seam(key):
            if size <= self._part_bytes:
                self._usual.put(key, flat or b"", use_multipart=False)
                return
            part_bytes = max(self._part_bytes, -(-size // PARTS_MAX))
            self._usual.put(
                key,
                slices(flat, part_bytes),
                use_multipart=True,
                chunk_size=part_bytes,
                max_concurrency=self._parts_parallel,
            )

    def create(self, key: str, data: Blob) -> None:
        """As in the protocol; in one request of at most 5 GiB, sent once.

        Large data is better ``put`` under a name of its own, and only the small object that names it created.
        """
        check_key(key)
        flat = views(data)
        size = sum(map(len, flat))
        if size > CREATE_BYTES_MAX:
            raise MisuseError(f"create takes {CREATE_BYTES_MAX} bytes at most, {key} has {size}; put large objects")
        client = self._once if size <= self._part_bytes else self._once_large
        with self._seam(key):
            client.put(key, flat or b"", mode="create", use_multipart=False)

    def head(self, key: str) -> ObjectInfo:
        check_key(key)
        with self._seam(key):
            return _info(self._usual.head(key))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        check_list(prefix, start_after)
        return self._walk(prefix, start_after)

    def delete(self, key: str) -> None:
        check_key(key)
        with suppress(ObjectNotFoundError), self._seam(key):
            self._usual.delete(key)

    # --- requests ----------------------------------------------------------------------------------------------------

    @cached_property
    def _usual(self) -> Any:
        return self._client(retries=self._retries, stall_timeout_s=self._stall_timeout_s)

    @cached_property
    def _once(self) -> Any:
        return self._client(retries=0, stall_timeout_s=self._stall_timeout_s)

    @cached_property
    def _once_large(self) -> Any:
        # no bytes come back while a body goes up, so the time-out for a stalled reply would cut a long upload short
        return self._client(retries=0, stall_timeout_s=self._request_timeout_s)

    def _client(self, *, retries: int, stall_timeout_s: float) -> Any:
        from obstore.store import from_url

        endpoints = [str(value) for name, value in self._config.items() if "endpoint" in name]
        endpoints += [os.environ[name] for name in _ENDPOINTS if name in os.environ]
        options: dict[str, Any] = {
            "connect_timeout": timedelta(seconds=self._connect_timeout_s),
            "read_timeout": timedelta(seconds=stall_timeout_s),
            "timeout": timedelta(seconds=self._request_timeout_s),
            "user_agent": "thinwire",
        }
        if any(endpoint.startswith("http://") for endpoint in endpoints):  # whoever writes http:// means it
            options["allow_http"] = True
        retry_for = timedelta(seconds=min(self._request_timeout_s, _RETRY_FOR_S_MAX))
        provider = {} if self._credential_provider is None else {"credential_provider": self._credential_provider}
        build: Any = from_url  # typed by provider, which is known only from the URL
        return build(
            self._url,
            config=self._config,
            client_options=options,
            retry_config={"max_retries": retries, "retry_timeout": retry_for},
            **provider,
        )

    def _exactly(self, key: str, length: int, result: Any) -> bytes:
        data = result.bytes().to_bytes()
        if len(data) != length:
            raise StoreUnavailableError(
                f"{key} in {self._url}: {len(data)} bytes came instead of {length}; try again",
                key=key,
                actual=len(data),
                expected=length,
            )
        return bytes(data)

    def _walk(self, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        # obstore's prefixes are whole folders ("a/b" does not list "a/bc"): list the folder, leave out the others
        folder = prefix.rpartition("/")[0]
        with self._seam(prefix):
            chunks = iter(self._usual.list(folder or None, offset=start_after or None, chunk_size=_LIST_CHUNK))
        last = start_after
        while True:
            with self._seam(prefix):
                chunk = next(chunks, None)
            if chunk is None:
                return
            for info in map(_info, chunk):
                if info.key <= start_after:
                    continue
                if not info.key.startswith(prefix):
                    if info.key > prefix:
                        return  # in order, so none of the rest begins with it
                    continue
                if info.key <= last:
                    raise UnsupportedError(
                        f"{self._url} does not list in order of the keys ({info.key} after {last}); S3 Express"
                        " directory buckets do not: use a general purpose bucket",
                        key=info.key,
                        store=self._url,
                    )
                last = info.key
                if is_key(info.key):
                    yield info

    # --- errors ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _seam(self, key: str, *, asked: tuple[int, int] | None = None, opening: bool = False) -> Iterator[None]:
        """Everything obstore raises leaves as an error of ours."""
        from obstore.exceptions import BaseError

        from thinwire.stores.cloud_errors import translate

        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            ours = translate(error, url=self._url, key=key or "a listing", asked=asked, opening=opening)
            # a shared access signature of Azure is part of the URL, which is part of obstore's error
            raise ours from (None if "sig=" in str(error) else error)

    def __repr__(self) -> str:
        return f"CloudStore({self._url!r})"


def _info(meta: Any) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["last_modified"].timestamp())
