"""How a version that is made becomes one that exists: its objects first, its manifest last, and only once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from thinwire.errors import ObjectExistsError, ObjectNotFoundError, RetryError
from thinwire.stores import Store
from thinwire.sync.pending import Pending
from thinwire.sync.retrying import retrying
from thinwire.wire.manifest import Manifest, ObjectRef, manifest_key
from thinwire.wire.spec import MANIFEST_BYTES_MAX

__all__ = ["create_manifest", "upload"]

_UPLOADS = 4


def upload(store: Store, pending: Pending, *, limit_s: float) -> None:
    """Put the objects, several at once; those that are up are taken off the list even if others fail.

    Raises:
        RetryError: the store failed for longer than ``limit_s`` seconds.
    """

    def put(item: tuple[ObjectRef, list[bytes | memoryview]]) -> None:
        ref, buffers = item
        retrying(lambda: store.put(ref.key, buffers), limit_s=limit_s)

    with ThreadPoolExecutor(min(_UPLOADS, max(len(pending.uploads), 1))) as pool:
        futures = [(item, pool.submit(put, item)) for item in pending.uploads]
    pending.uploads = [item for item, future in futures if future.exception() is not None]
    for _, future in futures:
        future.result()


def create_manifest(store: Store, manifest: Manifest, *, limit_s: float) -> bool:
    """Create-only write of the manifest; a lost reply is settled by reading it back. Whether the version is ours.

    Raises:
        RetryError: the store failed for longer than ``limit_s`` seconds; it is not known whose the version is.
    """
    key, data = manifest_key(manifest.version), manifest.encode()
    later = retrying(lambda: next(iter(store.list("manifests/", start_after=key)), None), limit_s=limit_s)
    if later is not None:  # there are versions behind this one: it is long taken, even if its manifest were gone
        return False

    def attempt() -> bool:
        try:
            store.create(key, [data])
        except ObjectExistsError:
            pass
        except RetryError:
            with suppress(ObjectNotFoundError):
                return store.get(key, size_max=MANIFEST_BYTES_MAX) == data
            raise
        else:
            return True
        return store.get(key, size_max=MANIFEST_BYTES_MAX) == data

    return retrying(attempt, limit_s=limit_s)
