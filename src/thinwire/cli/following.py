"""``thinwire pull`` and ``thinwire follow``: a folder that holds a version, or always the newest one."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.cli.options import (
    CacheOption,
    Json,
    MaxAge,
    PeersOption,
    StoreArgument,
    Threads,
    TrustOption,
    existing_store,
    opened_store,
    seconds_of,
    trust_of,
)
from thinwire.cli.output import Output, bytes_text, watched
from thinwire.cli.watching import LogFormat, LogFormatOption, MetricsAddress, MetricsPort, watching
from thinwire.errors import NoPathError, ObjectNotFoundError, RefuseError, RetryError, StoreUnavailableError

if TYPE_CHECKING:
    from thinwire.cli.mirror import Mirror, Update
    from thinwire.sync.events import Observer
    from thinwire.sync.trust import Trust
    from thinwire.wire.manifest import Manifest

__all__ = ["follow", "pull"]

OutFolder = Annotated[
    Path,
    typer.Option("--out", "-o", metavar="DIR", help="The folder to write model.safetensors in.", show_default=False),
]
RETRY_S = 30.0
_PAUSE_MAX_S = 60.0


def _text(update: Update) -> str:
    step = f" (step {update.step})" if update.step is not None else ""
    if update.path == "held":
        what = "already there, proved"
    else:
        patches = f", {update.hops} patches" if update.hops > 1 else ""
        what = f"{update.path}{patches}, {bytes_text(update.bytes_fetched)} fetched"
    return f"version {update.version}{step}: {what}; {update.seconds:.1f} s; state {update.state[:16]}"


@contextmanager
def _mirror(
    output: Output,
    url: str,
    out: Path,
    threads: int,
    *,
    forward: bool,
    wait: bool,
    trust: Trust | None,
    observer: Observer | None = None,
    cache: Path | None = None,
    poll_s: float = 0.5,
    peers: str | None = None,
) -> Iterator[Mirror]:
    """The folder, locked. ``forward`` refuses versions older than what it holds; ``wait``: the store may come later.

    With ``trust`` the folder also remembers the newest version and keys that were seen.
    """
    from thinwire.cli.mirror import MEMORY_NAME, Mirror
    from thinwire.sync.events import observed
    from thinwire.sync.peering import leave
    from thinwire.sync.remote import Remote
    from thinwire.sync.trust import Memory

    store = (opened_store if wait else existing_store)(url, cache=cache, poll_s=poll_s, peers=peers)
    with ExitStack() as stack:
        stack.callback(leave, store)
        bars = stack.enter_context(output.bars())
        mirror = Mirror(
            out, Remote(observed(watched(store, bars), observer), retry_s=RETRY_S, in_parts=True),
            threads=threads, stages=bars, warn=output.warn,
        )  # fmt: skip
        stack.enter_context(mirror.locked())
        if trust is not None:
            memory = Memory.open(out / MEMORY_NAME)
            mirror.remote = Remote(mirror.remote.store, retry_s=RETRY_S, trust=trust, memory=memory, in_parts=True)
        if forward:
            mirror.remote.chain.floor = max(mirror.remote.chain.floor, mirror.version())
        yield mirror


def pull(
    ctx: typer.Context,
    store: StoreArgument,
    out: OutFolder,
    version: Annotated[int | None, typer.Option(min=1, help="The version; the newest by default.")] = None,
    trust: TrustOption = None,
    max_age: MaxAge = None,
    cache: CacheOption = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Write a version to DIR/model.safetensors, proved by its digest.

    If DIR holds an older version only patches are fetched, if it holds this one nothing is. The file appears whole or
    not at all; it names its version and state in its metadata.
    """
    output = Output(ctx, as_json=as_json)
    pinned = trust_of(trust, max_age)
    with _mirror(output, store, out, threads, forward=version is None, wait=False, trust=pinned, cache=cache) as mirror:
        if version is None:
            target = mirror.newest()
            if target is None:
                raise StoreUnavailableError(f"{store} holds no versions yet; is the publisher running?", store=store)
        else:
            try:
                target = mirror.remote.manifest(version)
            except ObjectNotFoundError as error:
                raise NoPathError(f"there is no version {version} in {store}", version=version) from error
        update = mirror.bring_to(target)
    output.document(asdict(update))
    output.say(_text(update))


def follow(
    ctx: typer.Context,
    store: StoreArgument,
    out: OutFolder,
    once: Annotated[bool, typer.Option("--once", help="Stop when DIR is at the newest version.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            parser=seconds_of, metavar="TIME", help="Stop when nothing new came for so long, such as 30s or 10m."
        ),
    ] = None,
    poll: Annotated[
        float, typer.Option(parser=seconds_of, metavar="TIME", help="Time between two looks, on average.")
    ] = "0.5s",  # type: ignore[assignment]
    command: Annotated[
        str | None, typer.Option("--exec", metavar="CMD", help="Shell command to run after each update.")
    ] = None,
    trust: TrustOption = None,
    max_age: MaxAge = None,
    cache: CacheOption = None,
    peers: PeersOption = None,
    log_format: LogFormatOption = LogFormat.text,
    metrics_port: MetricsPort = None,
    metrics_address: MetricsAddress = "127.0.0.1",
    threads: Threads = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON a version on stdout.")] = False,
) -> None:
    """Keep DIR/model.safetensors at the newest version. Each update replaces the file in one step.

    May be killed at any time, and goes on from what DIR holds. When several versions have come at once, it goes
    straight to the newest. The command given with --exec finds THINWIRE_VERSION, THINWIRE_STEP, THINWIRE_STATE and
    THINWIRE_FILE in its environment; its output goes to stderr.
    """
    output = Output(ctx, as_json=as_json)
    pinned = trust_of(trust, max_age)
    with (
        watching(output, log_format=log_format, port=metrics_port, address=metrics_address) as observer,
        _mirror(
            output,
            store,
            out,
            threads,
            forward=True,
            wait=True,
            trust=pinned,
            observer=observer,
            cache=cache,
            poll_s=poll,
            peers=peers,
        ) as mirror,
    ):
        deadline = _Deadline(timeout)
        for update in _updates(mirror, output, deadline, poll, once, observer):
            document: dict[str, Any] = asdict(update)
            output.say(_text(update))
            if command is not None:
                document["exec_status"] = _run(command, update, output)
            output.line(document)
            deadline.restart()


class _Deadline:
    """Ends when nothing has restarted it for ``limit_s``; never if that is None."""

    def __init__(self, limit_s: float | None) -> None:
        self.limit_s = limit_s
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()

    def pause(self, seconds: float) -> bool:
        """Sleep, at most to the end; False if that has come."""
        left = seconds if self.limit_s is None else self._since + self.limit_s - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(seconds, left))
        return True


def _tell(observer: Observer | None, mirror: Mirror, target: Manifest) -> Update:
    """Bring the folder to ``target``, and tell the observer."""
    from thinwire.sync.events import Applied, Fetched, Seen, tell

    if observer is None:
        return mirror.bring_to(target)
    tell(observer, Seen(target.version, mirror.version()))
    update = mirror.bring_to(target)
    if update.bytes_fetched:
        tell(observer, Fetched(update.version, update.bytes_fetched, update.hops, update.seconds))
    created = target.facts.get("created_ms")
    event = Applied(
        update.version, update.step, update.path, update.hops, update.bytes_fetched, None, created, update.seconds, ()
    )
    tell(observer, event)
    return update


def _updates(
    mirror: Mirror, output: Output, deadline: _Deadline, poll_s: float, once: bool, observer: Observer | None
) -> Iterator[Update]:
    """Each update as it happens. A store that does not answer, or a version that cannot be had, is waited out.

    Raises:
        StoreUnavailableError: no version has ever appeared before the deadline.
        NoPathError, RetryError: what stood in the way of a newer version, at the deadline or with ``once``.
    """
    from thinwire.sync.events import refused, tell
    from thinwire.sync.retrying import jittered

    held: Manifest | None = None
    failures, failure = 0, None
    while True:
        try:
            found = mirror.newest() if held is None else mirror.remote.after(held.version)
            if found is not None:
                yield _tell(observer, mirror, found)
                held = found
            failures, failure = 0, None
        except RefuseError as error:
            tell(observer, refused(error))
            raise
        except (NoPathError, RetryError) as error:
            if isinstance(error, NoPathError):
                tell(observer, refused(error))
            if once:
                raise
            output.warn(f"{error}; trying again")
            mirror.avoid.clear()  # what is damaged now may be mended
            failures, failure, found = failures + 1, error, None
        if found is not None and not once:
            continue
        if once and held is not None:
            return
        if not deadline.pause(jittered(min(poll_s * 2**failures, max(poll_s, _PAUSE_MAX_S)))):
            break
    if failure is not None:
        raise failure
    if held is None:
        raise StoreUnavailableError(f"no version has appeared within {deadline.limit_s:g} s; is the publisher running?")


def _run(command: str, update: Update, output: Output) -> int:
    step = "" if update.step is None else str(update.step)
    environment = {
        **os.environ,
        "THINWIRE_VERSION": str(update.version),
        "THINWIRE_STEP": step,
        "THINWIRE_STATE": update.state,
        "THINWIRE_FILE": os.path.abspath(update.file),
    }
    status = subprocess.run(command, shell=True, env=environment, stdin=subprocess.DEVNULL, stdout=2).returncode
    if status:
        output.warn(f"the command of --exec ended with status {status}")
    return status
