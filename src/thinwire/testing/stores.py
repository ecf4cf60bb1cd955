"""The contract of a store, as tests that run on any implementation.

Subclass :class:`StoreContract`, give it a fixture ``store`` that is empty at the start of every test, and let pytest
collect it::

    class TestMyStore(StoreContract):
        @pytest.fixture
        def store(self, tmp_path):
            return MyStore(tmp_path)

pytest explains failures better if it may rewrite the assertions here; put
``pytest.register_assert_rewrite("thinwire.testing.stores")`` into your ``conftest.py``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import pytest

from thinwire.errors import DamagedObjectError, MisuseError, ObjectExistsError, ObjectNotFoundError, RetryError
from thinwire.stores.probe import enforces_create
from thinwire.stores.protocol import Notify, Store

__all__ = ["StoreContract"]

GIB = 1 << 30

BAD_KEYS = [
    "",
    "/",
    "/etc/passwd",
    ".",
    "..",
    "../outside",
    "a/../../outside",
    "a/./b",
    "a//b",
    "a/",
    "a b",
    "a\\b",
    "a%2fb",
    "a\x00b",
    "a\nb",
    "a?b",
    "a*b",
    "~tmp/x",
    "C:x",
    "grüße",
    "a\u2024\u2024/b",
    "\uff0fetc",
    "١",
    "k" * 513,
]
"""Keys every verb must refuse: empty, absolute, escaping, not of the alphabet, too long."""


class StoreContract:
    """What thinwire relies on, verb by verb.

    Class attributes to override where a store needs it:

    - ``create_is_atomic``: False for a store that is known not to enforce create-only between writers; the races are
      then left out, and the probe must find the store out.
    - ``large_bytes``: size of the large object; choose it above the store's threshold for uploads in parts.
    - ``race_rounds``: how many keys eight threads race for.
    """

    create_is_atomic = True
    large_bytes = 12 << 20
    race_rounds = 5

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError("give the subclass a fixture 'store' that returns an empty store")

    # --- extras ------------------------------------------------------------------------------------------------------

    def test_a_waiter_is_woken_or_times_out(self, store: Store) -> None:
        """Only for stores that have the extra."""
        if not isinstance(store, Notify):
            return
        assert not store.wait_for("later", timeout_s=0.01)
        timer = threading.Timer(0.05, lambda: store.create("later", [b"x"]))
        timer.start()
        assert store.wait_for("later", timeout_s=30)
        timer.join()
        assert store.wait_for("later", timeout_s=0)

    # --- get, put ----------------------------------------------------------------------------------------------------

    def test_what_was_put_is_got(self, store: Store) -> None:
        store.put("a", [b"one"])
        assert store.get("a", size_max=3) == b"one"
        assert type(store.get("a", size_max=GIB)) is bytes

    def test_put_replaces(self, store: Store) -> None:
        store.put("a/b.c", [b"a longer first version"])
        store.put("a/b.c", [b"second"])
        assert store.get("a/b.c", size_max=GIB) == b"second"
        assert store.head("a/b.c").size == 6

    def test_every_character_of_the_alphabet_in_a_key(self, store: Store) -> None:
        keys = [
            "abcdefghijklmnopqrstuvwxyz",
            "upper/ABCDEFGHIJKLMNOPQRSTUVWXYZ",
            "0123456789/._-",
            "...",
            "-/_/.x",
            "a/..b",
        ]
        for key in keys:
            store.put(key, [key.encode()])
        assert [info.key for info in store.list("")] == sorted(keys)
        for key in keys:
            assert store.get(key, size_max=100) == key.encode()

    def test_a_long_key(self, store: Store) -> None:
        key = "/".join(["d" * 100] * 4) + "/" + "k" * 100
        store.create(key, [b"x"])
        assert store.get(key, size_max=1) == b"x"
        assert [info.key for info in store.list("d" * 50)] == [key]

    @pytest.mark.parametrize("data", [[], [b""], [b"", bytearray(), memoryview(b"")]])
    def test_empty_objects(self, store: Store, data: Sequence[bytes | bytearray | memoryview]) -> None:
        store.put("put", data)
        store.create("create", data)
        for key in ("put", "create"):
            assert store.get(key, size_max=0) == b""
            assert store.get_range(key, 0, 0) == b""
            assert store.head(key).size == 0
        with pytest.raises(ObjectExistsError):
            store.create("create", [b"taken, though empty"])

    def test_blobs_of_many_buffers(self, store: Store) -> None:
        whole = bytes(range(256)) * 40
        data: list[bytes | bytearray | memoryview] = []
        for start in range(0, len(whole), 7):
            piece = whole[start : start + 7]
            data.append((piece, bytearray(piece), memoryview(piece))[start % 3])
        store.put("put", data)
        store.create("create", data)
        assert store.get("put", size_max=len(whole)) == whole
        assert store.get("create", size_max=len(whole)) == whole

    def test_buffers_of_other_item_types_are_their_bytes(self, store: Store) -> None:
        words = memoryview(bytes(range(64))).cast("I")
        grid = memoryview(bytes(range(64))).cast("B", shape=[8, 8])
        store.put("a", [words, grid])
        assert store.get("a", size_max=128) == bytes(range(64)) * 2

    def test_data_that_is_no_sequence_of_buffers_is_refused(self, store: Store) -> None:
        for data in (b"one buffer", bytearray(b"x"), "text", [1, 2], ["text"], [memoryview(b"abcd")[::2]]):
            for write in (store.put, store.create):
                with pytest.raises(MisuseError):
                    write("a", data)  # type: ignore[arg-type]
        assert list(store.list("")) == []

    def test_the_callers_buffer_may_be_reused_after_the_call(self, store: Store) -> None:
        buffer = bytearray(b"before")
        store.put("put", [buffer])
        store.create("create", [buffer])
        buffer[:] = b"after!"
        assert store.get("put", size_max=6) == b"before"
        assert store.get("create", size_max=6) == b"before"

    def test_large_objects(self, store: Store) -> None:
        unit = bytes(range(251))  # a prime, so that a part in the wrong place shows
        whole = unit * (self.large_bytes // 251) + b"end"
        half = len(whole) // 2 + 1
        store.put("put", [memoryview(whole)[:half], whole[half:]])
        store.create("create", [memoryview(whole)[:half], whole[half:]])
        for key in ("put", "create"):
            assert store.get(key, size_max=len(whole)) == whole
            assert store.get_range(key, len(whole) - 4, 4) == whole[-4:]
            assert store.head(key).size == len(whole)
        with pytest.raises(ObjectExistsError):
            store.create("create", [whole])

    def test_get_reads_no_more_than_size_max(self, store: Store) -> None:
        store.put("a", [b"123456"])
        for size_max in (0, 1, 5):
            with pytest.raises(DamagedObjectError) as caught:
                store.get("a", size_max=size_max)
            assert "a" in str(caught.value)
        assert store.get("a", size_max=6) == b"123456"

    # --- ranges ------------------------------------------------------------------------------------------------------

    def test_ranges(self, store: Store) -> None:
        whole = bytes(range(200))
        store.put("a", [whole])
        for start, length in [(0, 1), (0, 200), (0, 199), (1, 199), (199, 1), (50, 100), (0, 0), (7, 0), (200, 0)]:
            got = store.get_range("a", start, length)
            assert got == whole[start : start + length]
            assert type(got) is bytes

    @pytest.mark.parametrize(("start", "length"), [(0, 201), (199, 2), (200, 1), (201, 0), (201, 1), (10**9, 10**9)])
    def test_a_range_beyond_the_end_is_damage(self, store: Store, start: int, length: int) -> None:
        store.put("a", [bytes(200)])
        with pytest.raises(DamagedObjectError):
            store.get_range("a", start, length)

    @pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, -1), (-5, 5)])
    def test_negative_ranges_are_refused(self, store: Store, start: int, length: int) -> None:
        store.put("a", [bytes(200)])
        with pytest.raises(MisuseError):
            store.get_range("a", start, length)

    # --- what is not there -------------------------------------------------------------------------------------------

    def test_missing_objects(self, store: Store) -> None:
        store.put("folder/object", [b"x"])
        for key in ("nothing", "folder", "folder/object/below", "folder/objec", "other/object"):
            with pytest.raises(ObjectNotFoundError) as caught:
                store.get(key, size_max=100)
            assert key in str(caught.value)
            assert caught.value.facts["key"] == key
            with pytest.raises(ObjectNotFoundError):
                store.get_range(key, 0, 1)
            with pytest.raises(ObjectNotFoundError):
                store.get_range(key, 0, 0)
            with pytest.raises(ObjectNotFoundError):
                store.head(key)

    def test_delete(self, store: Store) -> None:
        store.put("a/b", [b"x"])
        store.put("a/c", [b"y"])
        for _ in range(2):
            store.delete("a/b")
            with pytest.raises(ObjectNotFoundError):
                store.get("a/b", size_max=1)
        for key in ("nothing", "a", "a/c/d"):
            store.delete(key)
        assert [info.key for info in store.list("")] == ["a/c"]
        store.create("a/b", [b"again"])
        assert store.get("a/b", size_max=5) == b"again"

    # --- create ------------------------------------------------------------------------------------------------------

    def test_create_keeps_what_is_there(self, store: Store) -> None:
        store.create("a", [b"first"])
        for data in ([b"second"], [b"first"], []):
            with pytest.raises(ObjectExistsError) as caught:
                store.create("a", data)
            assert caught.value.facts["key"] == "a"
        assert store.get("a", size_max=5) == b"first"
        store.put("b", [b"put"])
        with pytest.raises(ObjectExistsError):
            store.create("b", [b"created"])
        assert store.get("b", size_max=5) == b"put"

    def test_the_probe_knows_this_store(self, store: Store) -> None:
        assert enforces_create(store) is self.create_is_atomic
        assert list(store.list("")) == []

    def test_eight_racing_creates_have_one_winner(self, store: Store) -> None:
        if not self.create_is_atomic:
            pytest.skip("this store does not enforce create-only")
        for round_number in range(self.race_rounds):
            key = f"race/{round_number:03d}"
            bodies = [bytes([racer]) * (1000 + racer) for racer in range(8)]
            outcomes = _together([partial(store.create, key, [body]) for body in bodies])
            losses = [outcome for outcome in outcomes if isinstance(outcome, ObjectExistsError)]
            assert len(losses) == 7, outcomes
            winner = next(racer for racer, outcome in enumerate(outcomes) if outcome is None)
            assert store.get(key, size_max=2000) == bodies[winner]

    # --- two at a time -----------------------------------------------------------------------------------------------

    def test_a_reader_never_sees_half_a_put(self, store: Store) -> None:
        versions = [bytes([65 + n]) * (200_000 + 50_000 * n) for n in range(3)]
        store.put("a", [versions[0]])
        done = threading.Event()

        def write() -> None:
            try:
                for n in range(30):
                    store.put("a", [versions[n % 3][:70_000], versions[n % 3][70_000:]])
            finally:
                done.set()

        def read() -> None:
            while not done.is_set():
                try:
                    got = store.get("a", size_max=GIB)
                except RetryError:  # a store that noticed the replacement may ask for another try
                    continue
                assert got in versions, f"{len(got)} bytes beginning {got[:1]!r}, ending {got[-1:]!r}"

        assert _together([write, read, read]) == [None, None, None]
        assert store.get("a", size_max=GIB) == versions[29 % 3]

    def test_threads_with_keys_of_their_own(self, store: Store) -> None:
        def work(worker: int) -> None:
            for n in range(5):
                key = f"shared/{worker}-{n}"
                store.create(key, [key.encode() * 100])
                assert store.get(key, size_max=GIB) == key.encode() * 100

        assert _together([partial(work, worker) for worker in range(4)]) == [None] * 4
        assert len(list(store.list("shared/"))) == 20

    # --- listing -----------------------------------------------------------------------------------------------------

    KEYS = ("a", "b-c", "b.c", "b/1", "b/10", "b/2", "b/c/d", "b0", "bb/1", "c/1")

    def test_list_is_in_order_of_the_keys(self, store: Store) -> None:
        assert list(store.list("")) == []
        assert list(store.list("b/")) == []
        for key in reversed(self.KEYS):
            store.put(key, [key.encode()])
        infos = list(store.list(""))
        assert [info.key for info in infos] == sorted(self.KEYS) == list(self.KEYS)
        assert [info.size for info in infos] == [len(key) for key in self.KEYS]
        alone = store.head("b/1")
        assert (infos[3].key, infos[3].size) == (alone.key, alone.size)
        assert abs(infos[3].modified_s - alone.modified_s) <= 1  # S3 lists milliseconds, but a reply's header has none

    def test_prefix_and_start_after(self, store: Store) -> None:
        for key in self.KEYS:
            store.put(key, [b"x"])
        for prefix in ("", "b", "b/", "b/1", "b/c", "b/c/", "b/c/d", "b/c/de", "z", "z/", "b-", "B", "c/1"):
            for start_after in ("", "a", "b", "b/", "b/1", "b/1a", "b/c/d", "b0", "c/1", "z"):
                found = [info.key for info in store.list(prefix, start_after=start_after)]
                wanted = [key for key in self.KEYS if key.startswith(prefix) and key > start_after]
                assert found == wanted, (prefix, start_after)

    def test_a_listing_of_hundreds(self, store: Store) -> None:
        keys = [f"many/{n:05d}" for n in range(250)]
        for key in keys:
            store.put(key, [b"x"])
        assert [info.key for info in store.list("many/")] == keys
        assert [info.key for info in store.list("many/", start_after=keys[120])] == keys[121:]
        assert next(iter(store.list("many/"))).key == keys[0]

    def test_times_are_seconds_since_the_epoch(self, store: Store) -> None:
        before_s = time.time()
        store.put("a", [b"x"])
        for info in (store.head("a"), next(iter(store.list("a")))):
            # a server's clock may differ and S3 rounds to seconds; an error of unit or time zone is 15 minutes or more
            assert abs(info.modified_s - before_s) < 600

    # --- keys --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_bad_keys_are_refused_by_every_verb(self, store: Store, key: str) -> None:
        calls: list[Callable[[], object]] = [
            lambda: store.get(key, size_max=1),
            lambda: store.get_range(key, 0, 1),
            lambda: store.put(key, [b"x"]),
            lambda: store.create(key, [b"x"]),
            lambda: store.head(key),
            lambda: store.delete(key),
        ]
        for call in calls:
            with pytest.raises(MisuseError):
                call()

    @pytest.mark.parametrize("text", ["/", "../", "a/../", "a//", "./", "ü", "a b", "a*", "~tmp/"])
    def test_bad_prefixes_are_refused_at_once(self, store: Store, text: str) -> None:
        with pytest.raises(MisuseError):
            store.list(text)
        with pytest.raises(MisuseError):
            store.list("", start_after=text)

    # --- the object itself -------------------------------------------------------------------------------------------

    def test_it_is_a_store_with_a_name(self, store: Store) -> None:
        assert isinstance(store, Store)
        assert "://" in store.url
        assert "@" not in store.url


def _together(calls: Sequence[Callable[[], object]]) -> list[BaseException | None]:
    """Run the calls in threads that start at the same moment; what each raised."""
    outcomes: list[BaseException | None] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(index: int) -> None:
        barrier.wait(timeout=60)
        try:
            calls[index]()
        except BaseException as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "a store operation did not return within 120 s"
    return outcomes
