"""What there is to tell of a chain, as plain data: every number of the page is one of these, or a sum of them.

What is missing or damaged is a status of its version, never an exception: a report is wanted most when things are bad.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from thinwire.cli.health import Problem, check_chain, read_chain
from thinwire.cli.health_signed import check_signed
from thinwire.cli.report.tables import Table, read_table
from thinwire.errors import DamagedObjectError, MalformedError, MisuseError, ObjectNotFoundError, ThinwireError
from thinwire.stores.protocol import Store
from thinwire.sync.collector import expected_objects
from thinwire.sync.retrying import retrying
from thinwire.sync.trust import Trust
from thinwire.wire.manifest import Manifest, ObjectRef, manifest_key, version_of_key
from thinwire.wire.signing import parse_signatures
from thinwire.wire.skip import SKIP_BYTES_MAX, SKIPS_PREFIX, Skip, skip_key, skip_of_key

__all__ = ["ChainFacts", "SkipFacts", "Totals", "VersionFacts", "read_facts"]

RETRY_S = 30.0
_FINE = ("ok", "given up")
_GAP_MAX = 100


@dataclass(frozen=True, slots=True)
class VersionFacts:
    """One version.

    ``status`` is ``ok``; ``given up`` (by gc, on purpose); ``no manifest`` (the number is missing between others);
    ``unreadable`` (its manifest); ``missing`` or ``damaged`` (an object that it needs); ``contradicts`` (its manifest,
    another's); ``untrusted`` (by the keys that were given). Sizes are in bytes; ``density`` is the share of cells that
    changed, None if the publisher did not say; ``interval_s`` the time since the version before was made, by the
    publishers' clocks. ``signatures`` is how many
    there are; -1 if they are malformed. ``tensors`` is (changed, cells) by name, from the patch's table.
    """

    version: int
    status: str
    step: int | None = None
    kind: str = ""
    level: str = ""
    created_ms: int | None = None
    interval_s: float | None = None
    base: int | None = None
    anchor_version: int | None = None
    delta_bytes: int = 0
    anchor_bytes: int = 0
    tree_bytes: int = 0
    manifest_bytes: int = 0
    state_bytes: int | None = None
    changed: int | None = None
    elements: int | None = None
    signatures: int = 0
    state: str = ""
    problems: tuple[str, ...] = ()
    tensors: Mapping[str, tuple[int, int]] | None = None

    @property
    def total_bytes(self) -> int:
        """What publishing this version put into the store, but for skip deltas."""
        return self.delta_bytes + self.anchor_bytes + self.tree_bytes + self.manifest_bytes

    @property
    def density(self) -> float | None:
        """Share of the elements that changed."""
        return None if self.changed is None or not self.elements else self.changed / self.elements


@dataclass(frozen=True, slots=True)
class SkipFacts:
    """A skip delta: ``status`` as of a version, ``bytes`` of its patch."""

    base: int
    version: int
    bytes: int
    changed: int
    status: str


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over every version whose manifest can be read.

    ``published_bytes``: patches, anchors, trees and manifests. ``full_bytes``: what as many full checkpoints are, of
    the versions that say how large they are; ``saved`` compares it with those versions' published bytes.
    ``stored_bytes``: objects that are in the store now, and skip deltas.
    """

    versions: int
    given_up: int
    anchors: int
    delta_bytes: int
    anchor_bytes: int
    skip_bytes: int
    published_bytes: int
    full_bytes: int
    saved: float | None
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class ChainFacts:
    """A chain as a report shows it. ``versions`` are those shown, in order; ``totals`` and ``problems`` are of all."""

    store: str
    newest: int
    versions: tuple[VersionFacts, ...]
    skips: tuple[SkipFacts, ...]
    totals: Totals
    problems: tuple[Problem, ...]


def read_facts(
    store: Store,
    *,
    last: int | None = None,
    trust: Trust | None = None,
    stages: Callable[[str, int, int], None] | None = None,
) -> ChainFacts:
    """Read every manifest, a listing, and for the ``last`` versions (None: all) the tables of their patches.

    With ``trust`` the manifests' signatures are checked too.

    Raises:
        MisuseError: the store holds no versions, or ``last`` is below 1.
        MalformedError: not one manifest can be read.
        RetryError: the store does not answer.
    """
    if last is not None and last < 1:
        raise MisuseError(f"last must be at least 1, not {last}")
    chain = read_chain(store)
    problems = [*chain.problems, *check_chain(chain.manifests)]
    refused = check_signed(store, chain, trust) if trust is not None else []
    problems += refused
    listed = retrying(lambda: list(store.list("objects/")), limit_s=RETRY_S)
    sizes = {info.key: info.size for info in listed}
    try:
        needed = expected_objects(chain.manifests, chain.collected)[1]
    except ThinwireError as error:  # a chain with holes: then everything is looked for
        problems.append(Problem.of("collected.json", error))
        needed = {ref.key: ref for manifest in chain.manifests.values() for ref in manifest.objects()}
    problems += _lacking(needed, sizes)
    numbers = {*chain.manifests, *(v for p in chain.problems if (v := version_of_key(p.where)))}
    gave_up = chain.collected.gave_up if chain.collected is not None else lambda _: False
    by_key = _by_key(problems)
    everyone = [
        _version(v, chain.manifests, by_key, given_up=gave_up(v), read=v in numbers)
        for v in _with_gaps(sorted(numbers))
    ]
    untrusted = {v for problem in refused if (v := version_of_key(problem.where))}
    everyone = [replace(v, status="untrusted") if v.version in untrusted else v for v in everyone]
    shown = everyone[-last:] if last is not None else everyone
    shown, found = _with_tables(store, shown, chain.manifests, sizes, stages)
    skips, bad_skips = _skips(store, chain.manifests, shown[0].version)
    sound = [v for v in everyone if v.version in chain.manifests]
    skip_bytes = sum(skip.bytes for skip in skips if skip.status == "ok")
    return ChainFacts(
        store=store.url,
        newest=max(numbers),
        versions=tuple(shown),
        skips=tuple(skips),
        totals=_totals(sound, skip_bytes, sum(sizes.values()) + skip_bytes),
        problems=(*problems, *found, *bad_skips),
    )


def _with_gaps(numbers: Sequence[int]) -> list[int]:
    """The numbers and those missing between them; of a long gap (a stray manifest may claim any) its beginning."""
    found = [numbers[0]]
    for number in numbers[1:]:
        found += [*range(found[-1] + 1, min(number, found[-1] + 1 + _GAP_MAX)), number]
    return found


def _lacking(needed: Mapping[str, ObjectRef], sizes: Mapping[str, int]) -> list[Problem]:
    """What a listing tells of objects that must be there. Digests are left to ``verify``."""
    found: list[Problem] = []
    for key, ref in needed.items():
        size = sizes.get(key)
        if size is None:
            found.append(Problem.of(key, ObjectNotFoundError("it is not in the store")))
        elif size != ref.size:
            found.append(Problem.of(key, DamagedObjectError(f"it has {size} bytes, its manifest says {ref.size}")))
    return found


def _by_key(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    found: dict[str, list[Problem]] = {}
    for problem in problems:
        found.setdefault(problem.where, []).append(problem)
    return found


def _version(
    version: int, manifests: Mapping[int, Manifest], by_key: Mapping[str, list[Problem]], *, given_up: bool, read: bool
) -> VersionFacts:
    key, manifest = manifest_key(version), manifests.get(version)
    own = by_key.get(key, [])
    if manifest is None:
        texts = tuple(p.message for p in own) or ("there is no manifest of this number",)
        return VersionFacts(version, "unreadable" if read else "no manifest", problems=texts)
    objects = [p for ref in manifest.objects() for p in by_key.get(ref.key, [])]
    status = "given up" if given_up else "ok"
    if own:
        status = "contradicts"
    elif objects:
        status = "missing" if any(p.kind == "ObjectNotFoundError" for p in objects) else "damaged"
    before, facts = manifests.get(version - 1), manifest.facts
    created, earlier = facts.get("created_ms"), None if before is None else before.facts.get("created_ms")
    try:
        signatures = len(parse_signatures(manifest.signatures))
    except MalformedError:
        signatures = -1
    cheapest = min(manifest.deltas, key=lambda d: d.object.size, default=None)
    return VersionFacts(
        version=version,
        status=status,
        step=manifest.step,
        kind="+".join(k for k, there in (("delta", manifest.deltas), ("anchor", manifest.anchor)) if there),
        created_ms=created,
        interval_s=None if created is None or earlier is None else (created - earlier) / 1000,
        base=None if cheapest is None else cheapest.base,
        anchor_version=manifest.anchor_version,
        delta_bytes=sum(d.object.size for d in manifest.deltas),
        anchor_bytes=manifest.anchor_bytes,
        tree_bytes=manifest.tree.size,
        manifest_bytes=len(manifest.encode()),
        state_bytes=facts.get("state_bytes"),
        changed=facts.get("changed"),
        elements=facts.get("elements"),
        signatures=signatures,
        state=manifest.state,
        problems=tuple(f"{p.where}: {p.message}" for p in (*own, *objects)),
    )


def _with_tables(
    store: Store,
    shown: Sequence[VersionFacts],
    manifests: Mapping[int, Manifest],
    sizes: Mapping[str, int],
    stages: Callable[[str, int, int], None] | None,
) -> tuple[list[VersionFacts], list[Problem]]:
    """The versions with what their patches' tables say, and what is wrong with those."""
    done = 0

    def read(version: VersionFacts) -> tuple[VersionFacts, Problem | None]:
        nonlocal done
        manifest = manifests.get(version.version)
        deltas = [] if manifest is None else [d for d in manifest.deltas if d.base == version.base]
        problem: Problem | None = None
        if manifest is not None and deltas and deltas[0].object.key in sizes:
            key = deltas[0].object.key
            try:
                table = read_table(store, manifest, deltas[0], retry_s=RETRY_S)
                version = replace(version, level=table.level, tensors=_checked(table, version))
            except ThinwireError as error:
                if error.exit_code == 6:
                    raise
                if not any(text.startswith(key) for text in version.problems):  # else it has been told
                    problem = Problem.of(key, error)
                    status = "damaged" if version.status in _FINE else version.status
                    version = replace(version, status=status, problems=(*version.problems, f"{key}: {error}"))
        done += 1
        if stages is not None:
            stages("tables", done, len(shown))
        return version, problem

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, shown))
    return [version for version, _ in found], [problem for _, problem in found if problem is not None]


def _checked(table: Table, version: VersionFacts) -> dict[str, tuple[int, int]]:
    if version.changed is not None and table.changed != version.changed:
        raise MalformedError(f"its table counts {table.changed} changes, its manifest {version.changed}")
    return table.tensors


def _skips(store: Store, manifests: Mapping[int, Manifest], first: int) -> tuple[list[SkipFacts], list[Problem]]:
    """The skip deltas from ``first`` on. None is ever needed, so a bad one is told and does no more harm."""
    sizes = {info.key: info.size for info in retrying(lambda: list(store.list(SKIPS_PREFIX)), limit_s=RETRY_S)}
    pairs = sorted(
        pair
        for key in sizes
        if (pair := skip_of_key(key)) and key == skip_key(*pair) and pair[0] >= first and pair[1] <= max(manifests)
    )  # one to a later version was written while this reads

    def read(pair: tuple[int, int]) -> tuple[SkipFacts, Problem | None]:
        key = skip_key(*pair)
        try:
            data = retrying(lambda: store.get(key, size_max=SKIP_BYTES_MAX), limit_s=RETRY_S)
            skip = Skip.parse(data)
            ends = [manifests[v].state for v in pair if v in manifests]
            if len(ends) < 2:
                raise ObjectNotFoundError("there is no readable manifest of a version that it joins")
            if (skip.base, skip.version) != pair or [skip.base_state, skip.state] != ends:
                raise MalformedError("it is of other versions, or of other states than their manifests name")
            size = sizes.get(skip.object.key)
            if size is None:
                raise ObjectNotFoundError("its patch is not in the store")
            if size != skip.object.size:
                raise DamagedObjectError(f"its patch has {size} bytes, its record says {skip.object.size}")
        except ThinwireError as error:
            if error.exit_code == 6:
                raise
            status = "missing" if isinstance(error, ObjectNotFoundError) else "damaged"
            return SkipFacts(*pair, 0, 0, status), Problem.of(key, error)
        return SkipFacts(*pair, skip.object.size, skip.changed, "ok"), None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, pairs))
    return [skip for skip, _ in found], [problem for _, problem in found if problem is not None]


def _totals(versions: Sequence[VersionFacts], skip_bytes: int, stored_bytes: int) -> Totals:
    sized = [v for v in versions if v.state_bytes is not None]
    full = sum(v.state_bytes or 0 for v in sized)
    return Totals(
        versions=len(versions),
        given_up=sum(v.status == "given up" for v in versions),
        anchors=sum(v.anchor_bytes > 0 for v in versions),
        delta_bytes=sum(v.delta_bytes for v in versions),
        anchor_bytes=sum(v.anchor_bytes for v in versions),
        skip_bytes=skip_bytes,
        published_bytes=sum(v.total_bytes for v in versions),
        full_bytes=full,
        saved=1 - sum(v.total_bytes for v in sized) / full if full else None,
        stored_bytes=stored_bytes,
    )
