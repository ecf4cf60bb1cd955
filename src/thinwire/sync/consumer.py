"""The consumer: brings a model to the newest version in a store and keeps it there, bit for bit."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from thinwire.chain.plan import Hop
from thinwire.errors import (
    MalformedError,
    NoPathError,
    RefetchError,
    RefuseError,
    WrongBaseError,
)
from thinwire.peers import Carrier
from thinwire.sync import events
from thinwire.sync.apply import apply_patch
from thinwire.sync.encode import Progress
from thinwire.sync.following import Following, Offered
from thinwire.sync.host import Fetched, HostState, fetch_path, fetch_state
from thinwire.sync.layout import Layout
from thinwire.sync.remote import ReadableStore
from thinwire.sync.target import Target
from thinwire.sync.trust import Pinned
from thinwire.wire.digests import Tree
from thinwire.wire.manifest import Manifest
from thinwire.wire.patch import Patch

__all__ = ["ApplyResult", "Consumer", "Version"]

_log = logging.getLogger(__name__)
Model = torch.nn.Module | Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """What brought the model to ``version``, whose state has ``digest`` (computed from the model's own memory).

    ``path`` is ``anchor``, ``delta`` or ``anchor+delta``; ``hops`` counts patches; ``seconds`` by stage: ``fetch``,
    ``decode``, ``apply`` (with the hashing of most blocks), ``verify``, ``total``.
    """

    version: int
    step: int | None
    digest: str
    path: str
    hops: int
    bytes_fetched: int
    changed: int
    seconds: Mapping[str, float]


class Version(Offered):
    """A version that is newer than the one held. Its objects have been fetched; nothing has been applied."""

    def __init__(self, consumer: Consumer, manifest: Manifest, fetched: Fetched | None) -> None:
        super().__init__(manifest)
        self._consumer, self._fetched = consumer, fetched

    def apply(self, model: Model, *, progress: Progress | None = None) -> ApplyResult:
        """Bring ``model`` to this version, in place; it must be the model that the consumer loaded or applied last.

        The model is at every moment some published version, exactly. Patches are applied one by one, each proved by
        the digest of the result before the next begins, and undone if it is not proved; then the next-best way is
        taken, at last the newest anchor.

        Raises:
            NoPathError: no intact objects lead here. The model is as it was, or at a version on the way
                (``consumer.version``).
            MisuseError: the model has other tensors than the version.
            RetryError: the store does not answer.
        """
        result = self._consumer._apply(self.manifest, self._fetched, model, progress)
        events.tell(self._consumer.observer, events.applied(result, self.manifest))
        return result


class Consumer(Following[Version]):
    """Follows the versions in a store.

    Args:
        store: a folder, ``s3://``, ``gs://``, ``az://``, ``memory://`` or any fsspec URL; or a store that can get and
            list.
        poll_s: seconds between two looks for a new version, on average; each wait is jittered by half.
        retry_s: how long one request is retried while the store fails.
        floor: never take a version older than this for the newest (the highest one seen before a restart).
        threads: threads for decoding and hashing; 0 means one a core.
        trust: accept only what these keys have signed: a trust document's file, public keys' files, or a
            :class:`~thinwire.sync.trust.Trust`, which also says how fresh it must be. See ``docs/trust.md``.
        memory: a file in which to remember the newest version and keys that were seen, so that no store goes back on
            them after a restart either. One consumer a file.
        observer: called with what happens (:mod:`thinwire.sync.events`), for metrics and traces.
        cache: a folder that the workers of this machine share, so that each object comes from the store once, and all
            of them together look for a new version as often as four would (``docs/fleet.md``).
        peers: get versions from other workers first: ``"swarm"``, or a carrier of :mod:`thinwire.peers`; the store is
            asked for what they do not have. See ``docs/peers.md``.

    Raises:
        UntrustedError: (any call that looks at the store) what it shows is unsigned, signed by other keys than trusted,
            older than or different from what has been seen, or stale. The model is as it was.

    A consumer holds no copy of the model. It knows which version the model is at and leaves the proof to the digest.

    >>> import torch, thinwire
    >>> trained, served = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
    >>> publisher = thinwire.Publisher("memory://doc-consumer")
    >>> _ = publisher.publish(trained, step=0)
    >>> consumer = thinwire.Consumer("memory://doc-consumer")
    >>> consumer.load(served).version
    1
    >>> torch.equal(served.weight, trained.weight)
    True
    """

    def __init__(
        self,
        store: str | ReadableStore,
        *,
        poll_s: float = 0.5,
        retry_s: float = 30.0,
        floor: int = 0,
        threads: int = 0,
        trust: Pinned | None = None,
        memory: str | os.PathLike[str] | None = None,
        observer: events.Observer | None = None,
        cache: str | os.PathLike[str] | None = None,
        peers: str | Carrier | None = None,
    ) -> None:
        super().__init__(
            store, poll_s=poll_s, retry_s=retry_s, floor=floor, threads=threads, trust=trust, memory=memory,
            observer=observer, cache=cache, peers=peers, in_parts=False,
        )  # fmt: skip
        self._aliases: dict[str, str] = {}
        self._layouts: dict[str, Layout] = {}

    # --- loading ---------------------------------------------------------------------------------------------------

    def load(
        self, model: Model, *, version: int | None = None, timeout_s: float = 60.0, progress: Progress | None = None
    ) -> ApplyResult:
        """Bring ``model`` to the newest version, or to ``version``, from whatever is cheapest.

        The state is built and proved aside; the model is written at the very end. Waits up to ``timeout_s`` for a
        first version to appear.

        Raises:
            StoreUnavailableError: no version appeared in time.
            NoPathError: there is no such version, or no intact objects lead to it.
            MisuseError: the model has other tensors, data types or shapes.
        """
        began = time.perf_counter()
        state = self.fetch(version=version, timeout_s=timeout_s, progress=progress)
        result = self._write(state, model, began)
        events.tell(self.observer, events.applied(result, self._require_held()))
        return result

    def _write(self, state: HostState, model: Model, began: float) -> ApplyResult:
        """Make a proved state the model's."""
        target = Target(model, state.layouts, state.aliases, read=False)
        target.write(state.cells)
        manifest = self._remote.chain.manifests[state.version]
        self._hold(manifest, state.layouts, state.aliases)
        seconds = {**state.seconds, "total": time.perf_counter() - began}
        path = "anchor+delta" if state.hops else "anchor"
        changed = sum(layout.cells for layout in state.layouts.values())
        return ApplyResult(
            state.version, manifest.step, state.digest, path, state.hops, state.bytes_fetched, changed, seconds
        )

    @events.telling
    def fetch(
        self, *, version: int | None = None, timeout_s: float = 60.0, progress: Progress | None = None
    ) -> HostState:
        """The state of a version (the newest by default) in host memory, proved; no model is touched.

        Raises:
            StoreUnavailableError, NoPathError: as :meth:`load`.
        """
        manifest = self._wait_for_first(timeout_s) if version is None else self._manifest(version)
        events.tell(self.observer, events.Seen(max(manifest.version, self.version or 0), self.version or 0))
        state = fetch_state(self._remote, manifest, avoid=set(self._avoid), threads=self.threads, progress=progress)
        told = events.Fetched(state.version, state.bytes_fetched, state.hops, state.seconds["fetch"])
        events.tell(self.observer, told)
        return state

    def _hold(self, manifest: Manifest, layouts: Mapping[str, Layout], aliases: Mapping[str, str]) -> None:
        self._held, self._layouts, self._aliases = manifest, dict(layouts), dict(aliases)

    def adopt(self, state: HostState) -> None:
        """Go on from a state that was fetched with :meth:`fetch` (and, say, written to a file)."""
        self._hold(self._manifest(state.version), state.layouts, state.aliases)

    # --- following -------------------------------------------------------------------------------------------------

    @events.telling
    def poll(self, *, every: bool = False) -> Version | None:
        """The newest version behind the one held, or None; with ``every``, the very next one. Does not wait.

        Raises:
            MisuseError: nothing has been loaded yet.
            RetryError: the store does not answer.
        """
        held = self._require_held()
        found = self._remote.after(held.version)
        events.tell(self.observer, events.Seen((found or held).version, held.version))
        if found is None:
            return None
        if every and found.version > held.version + 1:
            found = self._manifest(held.version + 1)
        try:
            fetched: Fetched | None = self._fetch_to(found, held)
        except NoPathError:
            fetched = None  # apply() will say so, with the reason
        return Version(self, found, fetched)

    def _fetch_to(self, manifest: Manifest, held: Manifest | None, *, by_skips: bool = True) -> Fetched:
        have, state = (held.version, held.state) if held is not None else (None, None)
        try:
            found = fetch_path(
                self._remote, manifest, have=have, have_state=state, avoid=self._avoid, by_skips=by_skips
            )
        except NoPathError:
            self._avoid.clear()  # what was damaged on its way, twice, may be whole at the next look
            raise
        told = events.Fetched(manifest.version, found.size, len(found.patches), found.seconds)
        events.tell(self.observer, told)
        return found

    # --- applying --------------------------------------------------------------------------------------------------

    @events.telling
    def _apply(
        self, manifest: Manifest, fetched: Fetched | None, model: Model, progress: Progress | None
    ) -> ApplyResult:
        began = time.perf_counter()
        seconds = {"fetch": 0.0, "decode": 0.0, "apply": 0.0, "verify": 0.0}
        bytes_fetched = hops = changed = 0
        lost, by_skips = False, True
        while True:
            held = self._require_held()
            if held.version >= manifest.version:
                break
            if fetched is None:
                fetched = self._fetch_to(manifest, None if lost else held, by_skips=by_skips)
            if fetched.path.anchor_version is not None:
                return self._apply_anchor(manifest, fetched, model, began, seconds, bytes_fetched, progress)
            seconds["fetch"] += fetched.seconds
            bytes_fetched += fetched.size
            target = Target(model, self._layouts, self._aliases, read=True)
            for hop, data in zip(fetched.path.hops, fetched.patches, strict=True):
                try:
                    changed += self._hop(hop, data, target, seconds, progress)
                except WrongBaseError as error:
                    if hop.skip:  # it may lie about what it changes: a manifest's own delta will tell
                        by_skips = False
                        _log.warning("skip deltas are not used to get to version %d: %s", manifest.version, error)
                    else:  # the model is not what it was left as: only an anchor helps
                        lost = True
                    break
                except (RefetchError, RefuseError) as error:
                    self._avoid.add(hop.delta.object.key)
                    if hop.skip:
                        _log.warning("the skip delta to version %d is not used: %s", hop.version, error)
                    elif not isinstance(error, (RefetchError, MalformedError)):
                        raise
                    break
                hops += 1
            fetched = None
        seconds["total"] = time.perf_counter() - began
        assert self._held is not None
        return ApplyResult(
            self._held.version, self._held.step, self._held.state, "delta", hops, bytes_fetched, changed, seconds
        )

    def _hop(self, hop: Hop, data: bytes, target: Target, seconds: dict[str, float], progress: Progress | None) -> int:
        """Apply one patch; the number of changed elements. If it raises, everything is as it was."""
        manifest = self._remote.chain.manifests[hop.version]
        layouts = dict(target.layouts)
        patch = Patch.parse(data)
        if any(row.kind != "sparse" for row in patch.rows) or patch.removed:
            raise WrongBaseError("the version has other tensors than the model")
        if (patch.parent, patch.result) != (hop.delta.base_state, manifest.state):
            raise MalformedError("the patch leads elsewhere than its manifest says")
        report = apply_patch(
            patch,
            layouts,
            target.cells,
            aliases=self._aliases,
            threads=self.threads,
            progress=progress,
            watch=target.staged,
        )
        target.commit(report.touched)
        for stage in ("decode", "apply", "verify"):
            seconds[stage] += report.seconds[stage]
        self._hold(manifest, layouts, report.tree.aliases)
        return report.changed

    def _apply_anchor(
        self,
        manifest: Manifest,
        fetched: Fetched,
        model: Model,
        began: float,
        seconds: dict[str, float],
        earlier_bytes: int,
        progress: Progress | None,
    ) -> ApplyResult:
        state = fetch_state(
            self._remote, manifest, avoid=self._avoid, fetched=fetched, threads=self.threads, progress=progress
        )
        result = self._write(state, model, began)
        merged = {k: seconds.get(k, 0.0) + v for k, v in state.seconds.items()}
        merged["total"] = time.perf_counter() - began
        return replace(result, bytes_fetched=earlier_bytes + state.bytes_fetched, seconds=merged)

    def tree(self) -> Tree | None:
        """The published tree of the version held: the digest of each tensor, to tell which one diverged."""
        if self._held is None:
            return None
        return Tree.parse(self._remote.fetch(self._held.tree, self._held.hash))
