"""What a publisher or a consumer tells while it works, to whoever is given as ``observer``: metrics, traces, logs.

An observer is called with one event, in the thread where it happened, and must return soon. What it raises is logged
and goes no further, so that no version is lost to a dashboard. Without one nothing is made and nothing is called.

>>> import torch, thinwire
>>> seen = []
>>> publisher = thinwire.Publisher("memory://doc-events", observer=seen.append)
>>> report = publisher.publish(torch.nn.Linear(4, 4))
>>> [(type(event).__name__, event.version, event.kind) for event in seen]
[('Published', 1, 'anchor')]
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from thinwire.errors import RebaseError, RefetchError, RefuseError, RetryError, ThinwireError
from thinwire.wire.manifest import Manifest

__all__ = [
    "Applied", "Event", "Fetched", "Observer", "Published", "Refused", "Retried", "Seen", "Stage", "applied",
    "observed", "published", "refused", "tell", "telling",
]  # fmt: skip

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_R = TypeVar("_R")
_S = TypeVar("_S")


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the work: its name, its beginning in nanoseconds since the epoch, its length in seconds."""

    name: str
    began_ns: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Published:
    """A version was committed. ``kind`` is ``delta``, ``anchor`` or ``delta+anchor``; sizes are in bytes.

    ``stages``: ``base`` (the first time), ``encode``, ``upload``, ``commit``, in order; ``seconds`` of it all, with
    pauses between them (a version that is published in the background waits for its turn).
    """

    version: int
    step: int | None
    kind: str
    patch_bytes: int
    anchor_bytes: int
    total_bytes: int
    full_bytes: int
    changed: int
    elements: int
    seconds: float
    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """A look at the store: its newest version, and the one held (0: none yet)."""

    newest: int
    held: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """What leads to ``version`` is here, ``hops`` patches among it, each of the size and digest that are named."""

    version: int
    bytes: int
    hops: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Applied:
    """The model, or the file, is at ``version``, proved. ``path`` and ``hops`` as in ``ApplyResult``.

    ``created_ms`` is when the publisher made it (by its clock), None if it does not say. ``stages``: ``fetch``,
    ``decode``, ``apply``, ``verify``, and ``write`` for a state that was built aside; with several patches each is
    summed over them, and they are laid end to end.
    """

    version: int
    step: int | None
    path: str
    hops: int
    bytes_fetched: int
    changed: int | None
    created_ms: int | None
    seconds: float
    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """Something was not believed, or not to be had. ``kind`` is the error's class, ``version`` what it was about."""

    kind: str
    message: str
    version: int | None


@dataclass(frozen=True, slots=True)
class Retried:
    """A request failed; it is made again until the time for retries is up. ``verb`` is the store's method."""

    verb: str
    message: str


Event = Published | Seen | Fetched | Applied | Refused | Retried


class Observer(Protocol):
    """Anything that takes an event."""

    def __call__(self, event: Event, /) -> object:
        """Take note of ``event``, soon."""
        ...


def tell(observer: Observer | None, event: Event) -> None:
    """Hand over an event; what the observer raises is logged and goes no further."""
    if observer is not None:
        try:
            observer(event)
        except Exception:
            _log.warning("an observer failed at %s", type(event).__name__, exc_info=True)


def _laid(starts: Mapping[str, float], seconds: Mapping[str, float]) -> tuple[Stage, ...]:
    """Stages from readings of ``time.perf_counter``, compared with the clock once, so that they stay in order."""
    zero_ns = time.time_ns() - round(time.perf_counter() * 1e9)
    return tuple(Stage(name, zero_ns + round(at * 1e9), seconds[name]) for name, at in starts.items())


def published(report: Any, *, began: float, uploading: float) -> Published:
    """The event of a publisher's report; the times are readings of ``time.perf_counter``."""
    seconds: Mapping[str, float] = report.seconds
    encoding, committing = began + seconds["base"], uploading + seconds["upload"]
    starts = {"base": began, "encode": encoding, "upload": uploading, "commit": committing}
    return Published(
        report.version, report.step, report.kind, report.patch_bytes, report.anchor_bytes, report.total_bytes,
        report.full_bytes, report.changed, report.elements, seconds["total"], _laid(starts, seconds),
    )  # fmt: skip


def applied(result: Any, manifest: Manifest) -> Applied:
    """The event of a consumer's result, which has come about just now."""
    names = ("fetch", "decode", "apply", "verify")
    parts = {name: result.seconds.get(name, 0.0) for name in names}
    rest = result.seconds["total"] - sum(parts.values())
    if rest > 0 and result.path != "delta":
        parts["write"] = rest
    at, starts = time.perf_counter() - sum(parts.values()), {}
    for name, seconds in parts.items():
        starts[name] = at
        at += seconds
    return Applied(
        result.version, result.step, result.path, result.hops, result.bytes_fetched, result.changed,
        manifest.facts.get("created_ms"), sum(parts.values()), _laid(starts, parts),
    )  # fmt: skip


def refused(error: ThinwireError) -> Refused:
    """The event of an error."""
    version = error.facts.get("version")
    return Refused(type(error).__name__, str(error), version if type(version) is int else None)


class _Observing(Protocol):
    observer: Observer | None


def telling(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """A method whose refusals are told to its object's ``observer`` on their way out."""

    @functools.wraps(method)
    def run(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(self, *args, **kwargs)
        except (RefuseError, RefetchError, RebaseError) as error:
            tell(cast("_Observing", self).observer, refused(error))
            raise

    return run


class _Observed:
    """A store whose failing requests are told; all else goes straight to it."""

    def __init__(self, store: object, observer: Observer) -> None:
        self._store, self._observer = store, observer

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name.startswith("_") or not callable(found):
            return found

        @functools.wraps(found)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return found(*args, **kwargs)
            except RetryError as error:
                tell(self._observer, Retried(name, str(error)))
                raise

        return run


def observed(store: _S, observer: Observer | None) -> _S:
    """``store``, its failing requests told to ``observer``; itself without one."""
    return store if observer is None else cast("_S", _Observed(store, observer))
