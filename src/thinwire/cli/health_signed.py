"""What ``thinwire verify`` says of signatures and of skip deltas."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thinwire.chain.trusted import TrustedChain
from thinwire.cli.health import RETRY_S, Chain, Problem, check_object
from thinwire.errors import DamagedObjectError, RefetchError, RefuseError, ThinwireError, UntrustedError
from thinwire.sync.retrying import retrying
from thinwire.sync.trust import now_ms
from thinwire.wire.manifest import manifest_key
from thinwire.wire.skip import SKIP_BYTES_MAX, SKIPS_PREFIX, Skip, skip_key, skip_of_key
from thinwire.wire.trust import TRUST_PREFIX, trust_key, trust_version_of_key

if TYPE_CHECKING:
    from thinwire.stores.protocol import Store
    from thinwire.sync.remote import Remote
    from thinwire.sync.trust import Trust

__all__ = ["Skips", "check_signed", "check_skips", "replay_skips"]


@dataclass(slots=True)
class Skips:
    """The skip deltas of a store: those whose records can be read, how many objects and bytes, and what is wrong."""

    found: list[Skip]
    objects: int
    size: int
    problems: list[Problem]


def check_signed(store: Store, chain: Chain, trust: Trust) -> list[Problem]:
    """Every trust document must follow the pinned one, every manifest be signed or the parent of one that is, and the
    newest be as recent as ``trust`` wants it."""
    from thinwire.sync.remote import Remote

    remote = Remote(store, retry_s=RETRY_S, trust=trust, in_parts=True)
    guard = remote.guard
    assert guard is not None
    try:
        guard.refresh()
    except (RefuseError, RefetchError) as error:
        return [Problem.of(trust_key(guard.authority.document.version + 1), error)]
    problems = _documents(store, guard.authority.document.version)
    trusted = TrustedChain(authority=guard.authority)
    for version, manifest in sorted(chain.manifests.items(), reverse=True):
        try:
            trusted.accept(manifest.encode(), version=version, now_ms=now_ms())
        except RefuseError as error:
            problems.append(Problem.of(manifest_key(version), error))
    if not problems:
        try:
            remote.newest()
        except (RefuseError, RefetchError) as error:
            problems.append(Problem.of(manifest_key(max(chain.manifests)), error))
    return problems


def _documents(store: Store, held: int) -> list[Problem]:
    listing = retrying(lambda: list(store.list(TRUST_PREFIX)), limit_s=RETRY_S)
    beyond = [v for info in listing if (v := trust_version_of_key(info.key)) and v > held] if held else []
    error = UntrustedError(f"it does not follow: the last one that does is version {held}")
    return [Problem.of(trust_key(version), error) for version in beyond]


def check_skips(store: Store, chain: Chain, trust: Trust | None) -> Skips:
    """Every record of a skip delta must fit the two manifests and, if it is signed and keys are pinned, be signed by
    them; every patch must be what its record says. Patches without a record are an upload that was stopped: no harm."""
    authority = None
    if trust is not None:
        from thinwire.sync.guard import Guard

        guard = Guard(store, trust, None, retry_s=RETRY_S)
        with suppress(RefuseError, RefetchError):  # told by check_signed
            guard.refresh()
        authority = guard.authority
    believed = TrustedChain(authority=authority, vouched={m.digest for m in chain.manifests.values()})
    for version, manifest in sorted(chain.manifests.items(), reverse=True):
        try:
            believed.accept(manifest.encode(), version=version)
        except RefuseError:
            continue  # told by check_chain
    listing = retrying(lambda: list(store.list(SKIPS_PREFIX)), limit_s=RETRY_S)
    pairs = [pair for info in listing if (pair := skip_of_key(info.key)) and info.key == skip_key(*pair)]

    def check(pair: tuple[int, int]) -> tuple[Skip | None, Problem | None]:
        where, skip = skip_key(*pair), None
        try:
            data = retrying(lambda: store.get(where, size_max=SKIP_BYTES_MAX), limit_s=RETRY_S)
            missing = [version for version in pair if version not in believed.manifests]
            if missing:
                raise UntrustedError(f"it is of version {missing[0]}, which is not there or contradicts others")
            must = bool(Skip.parse(data).signatures) or (trust is not None and trust.signed_skips)
            skip = believed.accept_skip(data, base=pair[0], version=pair[1], now_ms=now_ms(), must_be_signed=must)
            where = skip.object.key
            check_object(store, skip.object, skip.hash, "record")
        except (RefuseError, RefetchError) as error:
            return None, Problem.of(where, error)
        return skip, None

    with ThreadPoolExecutor(4) as pool:
        checked = list(pool.map(check, pairs))
    found = [skip for skip, _ in checked if skip is not None]
    return Skips(
        found=found,
        objects=2 * len(found),
        size=sum(skip.object.size for skip in found),
        problems=[problem for _, problem in checked if problem is not None],
    )


def replay_skips(remote: Remote, held: Any, skips: list[Skip], *, threads: int) -> list[Problem]:
    """Apply the skip deltas that start from the state held to copies of it, and compare digests."""
    from thinwire.sync.apply import apply_patch
    from thinwire.wire.patch import Patch

    problems = []
    for skip in skips:
        if skip.base != held.version:
            continue
        cells = {name: array.copy() for name, array in held.cells.items()}
        try:
            patch = Patch.parse(remote.fetch(skip.object, skip.hash))
            if (patch.parent, patch.result) != (skip.base_state, skip.state):
                raise DamagedObjectError(f"its patch leads to state {patch.result}, its record says {skip.state}")
            report = apply_patch(patch, dict(held.layouts), cells, aliases=dict(held.aliases), threads=threads)
            if report.tree.digest != skip.state:
                raise DamagedObjectError(f"it makes state {report.tree.digest}, its record says {skip.state}")
        except ThinwireError as error:
            problems.append(Problem.of(skip.object.key, error))
    return problems
