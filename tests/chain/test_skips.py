"""Planning over skip deltas: none is cheaper, and a sketch from hints finds what the plan finds."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chain.test_chain import chain, digest, ref
from thinwire.chain.plan import HOP_BYTES, plan, sketch
from thinwire.chain.trusted import TrustedChain
from thinwire.errors import RefuseError, UntrustedError
from thinwire.wire.skip import Skip, skip_folder

SINGLE = 10**4


def skip(base: int, version: int, size: int = SINGLE) -> Skip:
    reference = replace(ref("x", size), key=skip_folder(base, version) + "x")
    return Skip(base, digest(f"state{base}"), version, digest(f"state{version}"), "blake3", reference)


@given(data=st.data())
def test_the_way_over_skips_leads_there_and_none_is_cheaper(data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 9))
    pairs = [(b, v) for v in range(3, length + 1) for b in range(1, v - 1)]
    chosen = data.draw(st.dictionaries(st.sampled_from(pairs), st.integers(1, 10**6), max_size=6)) if pairs else {}
    have = data.draw(st.integers(1, length - 1))
    target = data.draw(st.integers(have + 1, length))
    manifests = chain(length, anchor_bytes=10**9, delta_bytes=SINGLE)
    skips = [skip(base, version, size) for (base, version), size in chosen.items()]
    path = plan(manifests, target, have=have, have_state=manifests[have].state, skips=skips)

    def cheapest(version: int) -> float:  # exhaustive
        found = 0.0 if version == have else float("inf")
        if version > have:
            found = min(found, cheapest(version - 1) + SINGLE + HOP_BYTES)
        for (base, to), size in chosen.items():
            if to == version and base >= have:
                found = min(found, cheapest(base) + size + HOP_BYTES)
        return found

    at = have
    for hop in path.hops:
        assert hop.delta.base == at
        assert hop.skip == (hop.version - at > 1)
        assert hop.state == manifests[hop.version].state
        at = hop.version
    assert at == target
    assert path.size + HOP_BYTES * len(path.hops) == cheapest(target)
    way = sketch(chosen, target, starts={have: 0}, single_bytes=SINGLE)
    sizes = [chosen.get(pair, SINGLE) for pair in pairwise(way)]
    assert (way[0], way[-1]) == (have, target)
    assert sum(sizes) + HOP_BYTES * len(sizes) == cheapest(target)


def test_what_is_avoided_or_between_other_states_is_not_taken() -> None:
    manifests = chain(8)
    good = skip(2, 8)
    hops = plan(manifests, 8, have=2, skips=[good]).hops
    assert [hop.version for hop in hops] == [8]
    for other in (replace(good, state=digest("else")), replace(good, base_state=digest("else"))):
        assert len(plan(manifests, 8, have=2, skips=[other]).hops) == 6
    assert len(plan(manifests, 8, have=2, skips=[good], avoid={good.object.key}).hops) == 6
    assert len(plan(manifests, 7, have=2, skips=[good]).hops) == 5


def test_a_sketch_without_a_start_is_empty() -> None:
    assert sketch({}, 5, starts={}, single_bytes=1) == ()
    assert sketch({}, 5, starts={6: 0}, single_bytes=1) == ()
    assert sketch({}, 5, starts={5: 7}, single_bytes=1) == (5,)


def test_records_are_held_against_both_manifests() -> None:
    trusted = TrustedChain()
    for version, manifest in chain(8).items():
        trusted.accept(manifest.encode(), version=version)
    good = skip(2, 8)
    assert trusted.accept_skip(good.encode(), base=2, version=8) == good
    with pytest.raises(UntrustedError, match="2 to 8"):
        trusted.accept_skip(good.encode(), base=4, version=8)
    for changes in ({"state": "ab" * 32}, {"base_state": "ab" * 32}, {"hash": "sha256"}):
        with pytest.raises(UntrustedError, match="its manifest says"):
            trusted.accept_skip(replace(good, **changes).encode(), base=2, version=8)  # type: ignore[arg-type]


@given(st.binary(max_size=200))
def test_noise_is_no_record(data: bytes) -> None:
    with pytest.raises(RefuseError):
        Skip.parse(data)
