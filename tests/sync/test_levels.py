"""``level="auto"``: what is chosen is what the measured rates say, and versions stay exact whatever is chosen."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import thinwire
from thinwire.errors import MisuseError
from thinwire.stores import Blob
from thinwire.stores.memory import MemoryStore
from thinwire.sync.levels import CANDIDATES, LevelChooser

STATE = 10**9
CHANGED = 10**6


def _learn(chooser: LevelChooser, seconds: dict[str, float], size: dict[str, int], patches: int) -> list[str]:
    used = []
    for _ in range(patches):
        level = chooser.choose()
        used.append(level)
        chooser.encoded(level, state_bytes=STATE, changed=CHANGED, patch_bytes=size[level], seconds=seconds[level])
    return used


@given(
    st.tuples(*[st.floats(0.01, 10)] * 3),
    st.tuples(*[st.integers(10**4, 10**7)] * 3),
    st.floats(1e5, 1e12),
)
def test_the_choice_is_the_least_of_making_and_sending(
    seconds: tuple[float, ...], size: tuple[int, ...], link: float
) -> None:
    took, sizes = dict(zip(CANDIDATES, seconds, strict=True)), dict(zip(CANDIDATES, size, strict=True))
    chooser = LevelChooser(link)
    _learn(chooser, took, sizes, 6)
    cost = {level: took[level] + 8 * sizes[level] / link for level in CANDIDATES}
    best = min(cost.values())
    assert cost[chooser.choose()] <= best * (1 + 1e-9)
    assert chooser.expected_s(chooser.choose()) == pytest.approx(2 * best)


@given(st.lists(st.tuples(st.integers(1 << 16, 10**9), st.floats(1e-3, 100)), min_size=1, max_size=8))
def test_the_link_is_the_best_of_the_last_large_uploads(uploads: list[tuple[int, float]]) -> None:
    chooser = LevelChooser()
    for nbytes, seconds in uploads:
        chooser.sent(nbytes, seconds)
        chooser.sent(100, 1e-9)  # small ones tell of latency
    assert chooser.link_bytes_s == max(nbytes / seconds for nbytes, seconds in uploads)


def test_all_are_tried_first_and_the_others_now_and_then() -> None:
    chooser = LevelChooser(1e9)
    seconds = {"small": 1.0, "smallest": 2.0, "fast": 1.5}
    used = _learn(chooser, seconds, dict.fromkeys(CANDIDATES, 10**6), 120)
    assert used[:6] == [*CANDIDATES, *CANDIDATES]
    assert [level for level in used[6:] if level != "small"] == ["smallest", "fast", "smallest"]
    assert max(k for k, level in enumerate(used) if level != "small") > 90


def test_a_link_that_becomes_slow_changes_the_choice() -> None:
    chooser = LevelChooser()
    seconds = {"small": 1.0, "smallest": 1.1, "fast": 2.0}
    _learn(chooser, seconds, {"small": 4 * 10**6, "smallest": 2 * 10**6, "fast": 9 * 10**6}, 6)
    chooser.sent(10**9, 1.0)
    assert chooser.choose() == "small"
    for _ in range(8):
        chooser.sent(10**6, 1.0)
    assert chooser.choose() == "smallest"


def test_nothing_changed_and_nothing_there_are_no_division_by_zero() -> None:
    chooser = LevelChooser(1e6)
    for level in CANDIDATES * 3:
        chooser.encoded(level, state_bytes=0, changed=0, patch_bytes=300, seconds=0.0)
    assert chooser.choose() in CANDIDATES


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_link_without_a_rate_is_refused(rate: float) -> None:
    with pytest.raises(MisuseError):
        thinwire.Publisher(MemoryStore(), level="auto", link_mbit_s=rate)


def test_a_rate_without_auto_is_refused() -> None:
    with pytest.raises(MisuseError):
        thinwire.Publisher(MemoryStore(), level="small", link_mbit_s=100.0)


class _Slow(MemoryStore):
    """A memory store whose objects go up at ``rate`` bytes a second."""

    rate = 4e6

    def put(self, key: str, data: Blob) -> None:
        time.sleep(sum(len(part) for part in data) / self.rate)
        super().put(key, data)


def _adam_like(store: MemoryStore, versions: int, **settings: float) -> list[thinwire.PublishReport]:
    """Steps that move small weights often and large ones seldom, as Adam's do, and a consumer that follows."""
    random = torch.Generator().manual_seed(0)
    masters = torch.randn(1 << 19, generator=random) * 0.02
    reports = []
    with thinwire.Publisher(store, level="auto", dtype=torch.bfloat16, **settings) as publisher:
        reports.append(publisher.publish({"w": masters}))
        served = {"w": torch.zeros(1 << 19, dtype=torch.bfloat16)}
        consumer = thinwire.Consumer(store)
        consumer.load(served)
        for _ in range(versions):
            masters += 1e-6 * torch.randn(masters.shape, generator=random)
            reports.append(publisher.publish({"w": masters}))
            found = consumer.poll()
            assert found is not None
            found.apply(served)
            assert torch.equal(served["w"], masters.bfloat16())
    return reports


def test_the_link_is_measured_by_what_goes_up() -> None:
    store = _Slow()
    publisher = thinwire.Publisher(store, level="auto")
    publisher.publish({"w": torch.zeros(1 << 19)})
    assert publisher._levels is not None
    assert 0 < (publisher._levels.link_bytes_s or 0) <= store.rate


def test_over_a_slow_link_patches_are_the_smallest_and_exact() -> None:
    reports = _adam_like(MemoryStore(), 9, link_mbit_s=0.001)
    assert reports[0].level == ""
    assert {report.level for report in reports[7:]} == {"smallest"}
    each = {level: [r.patch_bytes for r in reports if r.level == level] for level in CANDIDATES}
    assert max(each["smallest"]) < min(each["small"]) < max(each["small"]) < min(each["fast"])
