"""How a version that is made becomes one that exists: its objects first, its manifest last, and only once.

For publishers of whole and of sharded models alike.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol, final

from thinwire.errors import ObjectExistsError, ObjectNotFoundError, RetryError, UnsafeStoreError
from thinwire.stores import Store
from thinwire.stores.probe import enforces_create
from thinwire.sync.pending import PublishReport
from thinwire.sync.retrying import retrying
from thinwire.wire.manifest import Manifest, ObjectRef, manifest_key
from thinwire.wire.spec import MANIFEST_BYTES_MAX

__all__ = ["Background", "Uploads", "check_create", "create_manifest", "upload"]

_UPLOADS = 4


class Uploads(Protocol):
    """What has yet to be put: references and bytes."""

    uploads: list[tuple[ObjectRef, list[bytes | memoryview]]]


def check_create(store: Store) -> None:
    """Raises UnsafeStoreError if the store does not enforce create-only writes."""
    if not enforces_create(store):
        raise UnsafeStoreError(
            f"{store.url} overwrites objects that were to be created only, so two publishers could both win a "
            "version. Use another store, or pass single_publisher=True if only one publisher ever runs",
            store=store.url,
        )


def upload(store: Store, pending: Uploads, *, limit_s: float) -> None:
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


@final
class Background:
    """Commits in a thread of its own, one at a time."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: Future[PublishReport] | None = None

    def run(self, commit: Callable[[], PublishReport]) -> Future[PublishReport]:
        """Begin; :meth:`settle` must have been called since the last time."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="thinwire-publish")
        self._under_way = self._pool.submit(commit)
        return self._under_way

    def settle(self) -> PublishReport | None:
        """Wait for what is under way; its report, or None if there is none or the store failed (it is then pending)."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            with suppress(RetryError):
                return under_way.result()
        return None

    def close(self, *, wait: bool = True) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=wait)
            self._pool = None
