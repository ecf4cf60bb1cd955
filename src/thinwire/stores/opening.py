"""From a URL to a store. Each kind of store is imported only when it is asked for."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import unquote, urlsplit

from thinwire.errors import MisuseError
from thinwire.stores.protocol import Store

__all__ = ["open_store"]

CLOUD_SCHEMES = ("s3", "gs", "az")
KNOWN = (
    "a path or file:// (a folder), memory://name, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix,"
    " and with the extra thinwire[fsspec] every protocol of fsspec, such as hf:// or ssh://"
)


def open_store(url: str | os.PathLike[str], **options: Any) -> Store:
    """The store that ``url`` names. Nothing is requested and no folder is made until the store is used.

    =================================  ==============================================================================
    URL                                store
    =================================  ==============================================================================
    ``/a/path``, ``file:///a/path``    :class:`thinwire.stores.local.LocalStore`
    ``memory://name``                  :class:`thinwire.stores.memory.MemoryStore`
    ``s3://``, ``gs://``, ``az://``    :class:`thinwire.stores.cloud.CloudStore`
    any other that fsspec knows        :class:`thinwire.stores.filesystem.FsspecStore`
    =================================  ==============================================================================

    ``options`` are the arguments of that class.

    Raises:
        MisuseError: nothing here knows the scheme, a package for it is missing, or an option is not known.

    >>> open_store("memory://shared").url
    'memory://shared'
    >>> open_store("nowhere://bucket")
    Traceback (most recent call last):
    thinwire.errors.MisuseError: no store for 'nowhere://', and fsspec does not know it either; known: a path or ...
    """
    text = os.fspath(url)
    scheme, separator, rest = text.partition("://")
    try:
        if not separator or os.path.isabs(text):
            from thinwire.stores.local import LocalStore

            if not text:
                raise MisuseError(f"the store's URL is empty; known: {KNOWN}")
            return LocalStore(text, **options)
        if scheme == "file":
            from thinwire.stores.local import LocalStore

            return LocalStore(_file_path(text), **options)
        if scheme == "memory":
            from thinwire.stores.memory import MemoryStore

            return MemoryStore(rest, **options)
        if scheme in CLOUD_SCHEMES:
            from thinwire.stores.cloud import CloudStore

            return CloudStore(text, **options)
    except TypeError as error:
        raise MisuseError(f"wrong options for a store at {scheme}: {error}", options=sorted(options)) from error

    from thinwire.stores.filesystem import FsspecStore

    return FsspecStore(text, **options)


def _file_path(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/"):
        raise MisuseError(f"{url} has a host; write file:///absolute/path, or a plain path", url=url)
    if parts.query or parts.fragment:
        raise MisuseError(
            f"{url} has a query or a fragment; escape ? as %3F and # as %23, or write a plain path", url=url
        )
    return unquote(parts.path)
