"""What a network and a busy server do to CloudStore; for any S3 server, through a proxy that misbehaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.stores.faulty_proxy import FaultyProxy, Kind
from thinwire.errors import DamagedObjectError, MisuseError, ObjectNotFoundError, StoreUnavailableError, ThinwireError
from thinwire.stores.cloud import CloudStore
from thinwire.stores.protocol import Store

Make = Callable[..., CloudStore]

VERBS: dict[str, tuple[str, Callable[[Store], object]]] = {
    "get": ("GET", lambda store: store.get("there", size_max=100_000)),
    "get_range": ("GET", lambda store: store.get_range("there", 10, 5)),
    "head": ("HEAD", lambda store: store.head("there")),
    "list": ("GET", lambda store: list(store.list(""))),
    "put": ("PUT", lambda store: store.put("new", [b"x" * 1000])),
    "create": ("PUT", lambda store: store.create("new", [b"x" * 1000])),
    "delete": ("DELETE", lambda store: store.delete("there")),
}
RETRIED = [verb for verb in VERBS if verb != "create"]
BODY = bytes(range(250)) * 100
MIB = 1 << 20


class CloudFaults:
    """Subclass with a fixture ``connect(endpoint, **options) -> CloudStore`` and one named ``endpoint``."""

    @pytest.fixture
    def proxy(self, endpoint: str) -> Iterator[FaultyProxy]:
        with FaultyProxy(endpoint) as proxy:
            yield proxy

    @pytest.fixture
    def make(self, proxy: FaultyProxy, connect: Callable[..., CloudStore]) -> Make:
        """Stores through the proxy that share one prefix, in which there is one object."""
        direct = connect(f"http://{proxy.upstream}")
        direct.put("there", [BODY])

        def make(**options: Any) -> CloudStore:
            return connect(proxy.endpoint, url=direct.url, **options)

        return make

    # --- failures that pass ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("verb", RETRIED)
    @pytest.mark.parametrize("kind", ["slow-down", "error-500", "drop-request", "drop-reply"])
    def test_passing_failures_are_retried(self, proxy: FaultyProxy, make: Make, verb: str, kind: Kind) -> None:
        method, call = VERBS[verb]
        proxy.fail(kind, method=method)
        call(make(retries=2))
        assert [seen for seen, _ in proxy.seen] == [method, method]

    @pytest.mark.parametrize("verb", VERBS)
    def test_lasting_failures_end_in_an_error(self, proxy: FaultyProxy, make: Make, verb: str) -> None:
        method, call = VERBS[verb]
        proxy.fail("slow-down", method=method, times=99)
        with pytest.raises(StoreUnavailableError, match=r"503.*" if method == "HEAD" else r"503.*SlowDown") as caught:
            call(make(retries=1))
        assert caught.value.facts["status"] == 503
        assert len(proxy.seen) == (1 if verb == "create" else 2)

    @pytest.mark.parametrize("verb", VERBS)
    def test_a_stalled_server_is_given_up(self, proxy: FaultyProxy, make: Make, verb: str) -> None:
        method, call = VERBS[verb]
        proxy.fail("stall", method=method, times=99)
        began_s = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            call(make(retries=1, stall_timeout_s=0.2))
        assert time.monotonic() - began_s < 10  # two attempts of 0.2 s; the proxy would hold them for 60 s

    @pytest.mark.parametrize("retries", [0, 2])
    def test_half_a_reply_is_never_taken_for_the_whole(self, proxy: FaultyProxy, make: Make, retries: int) -> None:
        store = make(retries=retries)
        for read in (lambda: store.get("there", size_max=len(BODY)), lambda: store.get_range("there", 0, len(BODY))):
            proxy.fail("half-reply", method="GET")
            try:
                assert read() == BODY
            except StoreUnavailableError:
                assert retries == 0

    def test_half_a_listing_is_never_taken_for_the_whole(self, proxy: FaultyProxy, make: Make) -> None:
        proxy.fail("half-reply", method="GET")
        with suppress(StoreUnavailableError):
            assert [info.key for info in make().list("")] == ["there"]

    # --- create ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("kind", ["slow-down", "error-500", "drop-request", "conflict-409"])
    def test_a_create_that_fails_is_not_repeated(self, proxy: FaultyProxy, make: Make, kind: Kind) -> None:
        store = make()
        proxy.fail(kind, method="PUT")
        with pytest.raises(StoreUnavailableError):
            store.create("new", [b"mine"])
        assert len(proxy.seen) == 1
        with pytest.raises(ObjectNotFoundError):
            store.head("new")
        store.create("new", [b"mine"])

    @pytest.mark.parametrize("size", [4, 6 * MIB])
    def test_a_create_whose_reply_is_lost_is_unknown_not_taken(self, proxy: FaultyProxy, make: Make, size: int) -> None:
        store = make(part_bytes=5 * MIB)
        proxy.fail("drop-reply", method="PUT")
        with pytest.raises(StoreUnavailableError):
            store.create("new", [b"m" * size])
        assert len(proxy.seen) == 1
        assert store.get("new", size_max=size) == b"m" * size  # reading it back tells

    def test_a_large_create_has_longer_than_a_stalled_reply(self, proxy: FaultyProxy, make: Make) -> None:
        store = make(part_bytes=5 * MIB, stall_timeout_s=0.3)
        proxy.fail("late-600ms", method="PUT", times=2)
        with pytest.raises(StoreUnavailableError):
            store.create("small", [b"s" * 5])
        store.create("large", [b"l" * (6 * MIB)])  # no bytes come back while a body goes up

    def test_a_conflict_on_put_passes(self, proxy: FaultyProxy, make: Make) -> None:
        proxy.fail("conflict-409", method="PUT", times=9)
        with pytest.raises(StoreUnavailableError):
            make(retries=1).put("new", [b"x"])

    # --- uploads in parts --------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(("kind", "method"), [("slow-down", "PUT"), ("drop-reply", "PUT"), ("slow-down", "POST")])
    def test_parts_are_retried(self, proxy: FaultyProxy, make: Make, kind: Kind, method: str) -> None:
        store = make(part_bytes=5 * MIB, retries=3)
        whole = bytes(range(256)) * (11 * MIB // 256) + b"end"
        proxy.fail(kind, method=method, text="uploadId=")
        store.put("large", [whole[:MIB], whole[MIB:]])
        assert store.get("large", size_max=len(whole)) == whole
        parts = [target for seen, target in proxy.seen if seen == "PUT" and "partNumber=" in target]
        assert len(parts) == 3 + (method == "PUT")

    def test_the_lost_reply_to_the_last_request_is_no_missing_object(self, proxy: FaultyProxy, make: Make) -> None:
        store = make(part_bytes=5 * MIB)
        whole = b"w" * (6 * MIB)
        proxy.fail("drop-reply", method="POST", text="uploadId=")
        with suppress(StoreUnavailableError):  # from a server that has forgotten the upload it completed
            store.put("large", [whole])
        assert store.get("large", size_max=len(whole)) == whole

    def test_an_upload_that_fails_leaves_the_old_object(self, proxy: FaultyProxy, make: Make) -> None:
        store = make(part_bytes=5 * MIB, retries=0)
        store.put("large", [b"old"])
        proxy.fail("error-500", method="PUT", text="partNumber=2", times=99)
        with pytest.raises(StoreUnavailableError):
            store.put("large", [bytes(11 * MIB)])
        assert store.get("large", size_max=3) == b"old"

    # --- failures that last ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("verb", VERBS)
    def test_refused_credentials_are_misuse(self, proxy: FaultyProxy, make: Make, verb: str) -> None:
        method, call = VERBS[verb]
        proxy.fail("denied-403", method=method, times=99)
        with pytest.raises(MisuseError, match="credentials") as caught:
            call(make())
        assert len(proxy.seen) == 1
        assert "testing" not in str(caught.value)

    @pytest.mark.parametrize("verb", VERBS)
    def test_a_bucket_that_is_not_there_is_misuse(
        self, endpoint: str, connect: Callable[..., CloudStore], verb: str
    ) -> None:
        store = connect(endpoint, url="s3://no-such-bucket/prefix")
        if verb in {"head", "delete"}:  # the reply to HEAD has no body to tell; what is not there is deleted
            with pytest.raises(ThinwireError) if verb == "head" else pytest.raises(MisuseError):
                VERBS[verb][1](store)
        else:
            with pytest.raises(MisuseError, match="no bucket"):
                VERBS[verb][1](store)

    def test_another_region_is_misuse(self, proxy: FaultyProxy, make: Make) -> None:
        proxy.fail("moved-301", method="GET", times=9)
        with pytest.raises(MisuseError, match="region"):
            make().get("there", size_max=10**6)

    # --- servers not to be believed ----------------------------------------------------------------------------------

    def test_the_size_is_looked_at_before_the_bytes(self, proxy: FaultyProxy, make: Make) -> None:
        store = make(stall_timeout_s=5.0)
        for _ in range(3):
            proxy.fail("huge", method="GET")
            began_s = time.monotonic()
            with pytest.raises(DamagedObjectError, match=str(1 << 42)):
                store.get("there", size_max=1000)
            assert time.monotonic() - began_s < 4

    def test_a_server_without_ranged_reads_is_told(self, proxy: FaultyProxy, make: Make) -> None:
        proxy.fail("no-ranges", method="GET", times=9)
        with pytest.raises(MisuseError, match="range"):
            make().get_range("there", 10, 5)
