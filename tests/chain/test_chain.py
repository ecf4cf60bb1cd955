"""What a sequence of manifests proves, the cheapest way to a version, and what may be deleted."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.chain.plan import HOP_BYTES, plan
from thinwire.chain.retention import retain
from thinwire.chain.trusted import TrustedChain
from thinwire.errors import MalformedError, MisuseError, NoPathError, RefuseError, UnsupportedError, UntrustedError
from thinwire.wire import canonical
from thinwire.wire.manifest import DeltaRef, Manifest, ObjectRef, Parent, manifest_key, version_of_key


def digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def ref(name: str, size: int = 1000) -> ObjectRef:
    return ObjectRef(f"objects/{name}", size, digest(name))


def chain(
    length: int,
    anchors: set[int] | None = None,
    skips: dict[int, list[int]] | None = None,
    anchor_bytes: int = 10**6,
    delta_bytes: int = 10**4,
) -> dict[int, Manifest]:
    anchors = {1} | (anchors or set())
    found: dict[int, Manifest] = {}
    for v in range(1, length + 1):
        before = found.get(v - 1)
        bases = ([v - 1] if v > 1 else []) + (skips or {}).get(v, [])
        deltas = tuple(DeltaRef(b, digest(f"state{b}"), ref(f"d{b}-{v}", delta_bytes)) for b in bases)
        anchor = (ref(f"a{v}", anchor_bytes),) if v in anchors else ()
        found[v] = Manifest(
            version=v, state=digest(f"state{v}"), hash="blake3",
            parent=Parent(v - 1, before.digest) if before else None,
            tree=ref(f"t{v}"), deltas=deltas, anchor=anchor, anchor_version=max(a for a in anchors if a <= v), step=v,
        )  # fmt: skip
    return found


def believed(manifests: dict[int, Manifest], order: list[int] | None = None) -> TrustedChain:
    trusted = TrustedChain()
    for v in order or sorted(manifests):
        trusted.accept(manifests[v].encode(), version=v)
    return trusted


# --- manifests -----------------------------------------------------------------------------------------------------


def test_a_manifest_reads_back_and_keeps_fields_it_does_not_know() -> None:
    manifest = chain(3)[3]
    value = json.loads(manifest.encode())
    value["signed"]["novelty"] = {"a": [1, None]}
    data = sealed(value)
    again = Manifest.parse(data)
    assert again.extra == {"novelty": {"a": [1, None]}}
    assert again.encode() == data
    assert again.digest != manifest.digest


def sealed(envelope: dict[str, object]) -> bytes:
    """The envelope with the digest that fits what it holds."""
    import blake3

    return canonical.dump({**envelope, "digest": blake3.blake3(canonical.dump(envelope["signed"])).hexdigest()})


def broken(path: list[str], value: object) -> bytes:
    found = json.loads(chain(3, {3})[3].encode())
    at = found["signed"]
    for key in path[:-1]:
        at = at[int(key)] if isinstance(at, list) else at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return sealed(found)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["version"], 0), (["version"], "3"), (["version"], 10**11), (["version"], True), (["state"], "xyz"),
        (["state"], ...), (["parent"], 5), (["parent", "version"], 3), (["parent", "manifest"], "00"),
        (["tree"], None), (["tree", "size"], -1), (["tree", "key"], "x" * 600), (["deltas"], None),
        (["deltas", "0", "base"], 3), (["deltas", "0", "object"], []), (["anchor"], "all"), (["anchor"], []),
        (["anchor_version"], 2), (["anchor_version"], 9), (["facts"], []), (["facts"], {"a": -1}),
        (["metadata"], {"a": 1}), (["step"], "one"), (["format"], "thinwire.manifest.v9"), (["hash"], "md5"),
    ],
)  # fmt: skip
def test_a_manifest_with_a_wrong_field_is_refused(path: list[str], value: object) -> None:
    with pytest.raises(RefuseError):
        Manifest.parse(broken(path, value))


def test_a_manifest_with_a_changed_digit_is_told_apart() -> None:
    data = chain(3)[3].encode()
    with pytest.raises(MalformedError, match="fetch it again"):
        Manifest.parse(data.replace(b'"size":10000', b'"size":10001'))


@given(st.binary(max_size=200))
def test_noise_is_no_manifest(data: bytes) -> None:
    with pytest.raises((MalformedError, UnsupportedError)):
        Manifest.parse(data)


def test_keys_sort_like_versions() -> None:
    versions = [1, 9, 10, 99, 100, 12345]
    assert sorted(map(manifest_key, reversed(versions))) == list(map(manifest_key, versions))
    assert [version_of_key(manifest_key(v)) for v in versions] == versions
    assert version_of_key("manifests/12.json") is None
    assert version_of_key("manifests/00000000１2.json") is None


# --- belief --------------------------------------------------------------------------------------------------------


@given(st.permutations(range(1, 7)))
def test_manifests_are_accepted_in_any_order(order: list[int]) -> None:
    trusted = believed(chain(6), order)
    assert trusted.newest is not None
    assert trusted.newest.version == 6


def test_a_manifest_of_another_version_is_refused() -> None:
    manifests = chain(3)
    with pytest.raises(UntrustedError, match="version 2"):
        TrustedChain().accept(manifests[2].encode(), version=3)


def test_two_manifests_of_one_version_are_refused() -> None:
    trusted = believed(chain(3))
    with pytest.raises(UntrustedError, match="two manifests"):
        trusted.accept(chain(3, {3})[3].encode(), version=3)


@given(st.permutations([2, 3]))
def test_a_fork_is_refused_whichever_side_comes_first(order: list[int]) -> None:
    mine, other = chain(3), chain(3, delta_bytes=77)
    pair = {2: mine[2], 3: other[3]}
    trusted = TrustedChain()
    trusted.accept(pair[order[0]].encode(), version=order[0])
    with pytest.raises(UntrustedError, match="fork"):
        trusted.accept(pair[order[1]].encode(), version=order[1])


def test_a_rollback_is_refused_across_restarts() -> None:
    manifests = chain(5)
    trusted = TrustedChain(floor=4)
    trusted.accept_newest(manifests[5].encode(), version=5)
    restarted = TrustedChain(floor=trusted.floor)
    with pytest.raises(UntrustedError, match="rollback"):
        restarted.accept_newest(manifests[4].encode(), version=4)


# --- planning ------------------------------------------------------------------------------------------------------


def cost(manifests: dict[int, Manifest], target: int, have: int | None = None) -> int:
    path = plan(manifests, target, have=have)
    return path.size + HOP_BYTES * (len(path.hops) + len(path.anchor))


def test_the_next_version_is_one_delta() -> None:
    path = plan(chain(10), 10, have=9)
    assert (path.anchor_version, [h.version for h in path.hops]) == (None, [10])


def test_a_newcomer_takes_the_anchor_nearest_in_bytes() -> None:
    path = plan(chain(10, {8}), 10)
    assert (path.anchor_version, [h.version for h in path.hops]) == (8, [9, 10])


def test_a_skip_delta_is_taken_where_it_is_cheaper() -> None:
    path = plan(chain(10, skips={10: [2]}), 10, have=2)
    assert [h.delta.base for h in path.hops] == [2]


def test_who_is_far_behind_takes_the_anchor() -> None:
    path = plan(chain(100, {99}, anchor_bytes=10**5), 100, have=2)
    assert path.anchor_version == 99


def test_what_is_damaged_is_avoided_and_without_a_way_it_says_so() -> None:
    manifests = chain(10, {5})
    assert plan(manifests, 7, avoid={"objects/a5"}).anchor_version == 1
    with pytest.raises(NoPathError, match="anchor"):
        plan(manifests, 7, avoid={"objects/a5", "objects/d2-3"})


def test_a_delta_from_another_state_than_the_one_held_is_not_taken() -> None:
    manifests = chain(3)
    assert plan(manifests, 3, have=2, have_state=manifests[2].state).anchor_version is None
    assert plan(manifests, 3, have=2, have_state=digest("else")).anchor_version == 1


@given(data=st.data())
def test_the_planned_path_leads_there_and_none_is_cheaper(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 7))
    anchors = data.draw(st.sets(st.integers(1, length)))
    skips = {
        v: sorted(data.draw(st.sets(st.integers(1, v - 2), max_size=2)) if v > 2 else set())
        for v in range(1, length + 1)
    }
    manifests = chain(length, anchors, skips, data.draw(st.integers(1, 10**6)), data.draw(st.integers(1, 10**6)))
    have = data.draw(st.none() | st.integers(1, length))
    target = data.draw(st.integers(have or 1, length))

    def cheapest(version: int) -> float:  # exhaustive
        found = 0.0 if version == have else float("inf")
        if manifests[version].anchor:
            found = min(found, manifests[version].anchor_bytes + HOP_BYTES)
        for delta in manifests[version].deltas:
            found = min(found, cheapest(delta.base) + delta.object.size + HOP_BYTES)
        return found

    path = plan(manifests, target, have=have)
    at = path.anchor_version if path.anchor_version is not None else have
    for hop in path.hops:
        assert hop.delta.base == at
        assert hop.state == manifests[hop.version].state
        at = hop.version
    assert at == target
    assert cost(manifests, target, have) == cheapest(target)


# --- retention -----------------------------------------------------------------------------------------------------


@given(
    length=st.integers(1, 12),
    anchors=st.sets(st.integers(1, 12)),
    last=st.integers(1, 5),
    keep=st.sets(st.integers(1, 12)),
)
def test_what_a_kept_version_needs_is_never_removed(length: int, anchors: set[int], last: int, keep: set[int]) -> None:
    manifests = chain(length, {a for a in anchors if a <= length})
    kept = retain(manifests, keep_last=last, keep=keep)
    everything = {r.key for m in manifests.values() for r in m.objects()}
    gone = everything - kept.objects
    assert length in kept.versions
    for version in kept.versions:
        assert plan(manifests, version, avoid=gone).size == plan(manifests, version).size
        for base in kept.versions:
            if base == version - 1:
                assert plan(manifests, version, have=base, avoid=gone).anchor_version is None


def test_old_versions_go() -> None:
    kept = retain(chain(100, {1, 50, 90}), keep_last=5)
    assert "objects/a90" in kept.objects
    assert not kept.objects & {"objects/a1", "objects/a50", "objects/d60-61"}


def test_the_newest_version_always_stays() -> None:
    with pytest.raises(MisuseError):
        retain(chain(3), keep_last=0)
