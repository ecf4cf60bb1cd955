"""Objects by key: memory, local folders, object stores of the cloud, anything fsspec knows.

:func:`open_store` makes a store from a URL; :mod:`thinwire.stores.protocol` says what every store promises and
:class:`thinwire.testing.stores.StoreContract` tests it.
"""

from __future__ import annotations

from thinwire.stores.opening import open_store
from thinwire.stores.probe import enforces_create
from thinwire.stores.protocol import (
    Blob,
    Create,
    Delete,
    Distrust,
    Get,
    GetRange,
    Head,
    List,
    Notify,
    ObjectInfo,
    Put,
    Store,
    check_key,
)

__all__ = [
    "Blob",
    "Create",
    "Delete",
    "Distrust",
    "Get",
    "GetRange",
    "Head",
    "List",
    "Notify",
    "ObjectInfo",
    "Put",
    "Store",
    "check_key",
    "enforces_create",
    "open_store",
]
