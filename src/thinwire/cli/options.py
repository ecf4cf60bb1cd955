"""Arguments and options that several commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire.errors import MisuseError

if TYPE_CHECKING:
    from thinwire.peers import Carrier
    from thinwire.stores.protocol import Store
    from thinwire.sync.trust import Trust

__all__ = [
    "CacheOption", "Dtype", "Hash", "HashOption", "Json", "KeyOption", "Level", "LevelOption", "MaxAge", "PeersOption",
    "StoreArgument", "Threads", "TrustOption", "Values", "ValuesOption", "examples", "existing_store", "opened_store",
    "seconds_of", "trust_of",
]  # fmt: skip


class Level(StrEnum):
    """Levels of compression."""

    fast = "fast"
    small = "small"
    smallest = "smallest"


class Values(StrEnum):
    """How new values are written."""

    ulp = "ulp"
    absolute = "absolute"


class Hash(StrEnum):
    """Hash functions."""

    blake3 = "blake3"
    sha256 = "sha256"


class Dtype(StrEnum):
    """Data types to publish as."""

    bf16 = "bf16"
    f16 = "f16"
    f32 = "f32"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, for programs.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads; 0 is one a core.")]
LevelOption = Annotated[Level, typer.Option(help="fast, small, or smallest, which takes the longest.")]
ValuesOption = Annotated[
    Values, typer.Option(help="ulp: steps from the old values, smaller. absolute: the new values themselves.")
]
HashOption = Annotated[Hash, typer.Option("--hash", help="Hash of all digests.")]
StoreArgument = Annotated[
    str, typer.Argument(help="A folder, s3://, gs://, az://, or any fsspec URL.", metavar="STORE", show_default=False)
]

_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def seconds_of(text: str | float) -> float:
    """Seconds of a duration such as ``90``, ``30s``, ``15m``, ``1.5h``, ``2d``.

    Raises:
        typer.BadParameter: it is none.

    >>> seconds_of("1.5h"), seconds_of("0")
    (5400.0, 0.0)
    """
    if not isinstance(text, str):  # a default
        return float(text)
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(s|min|m|h|d|)", text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a duration; write 90, 30s, 15m, 1.5h or 2d")
    return float(found[1]) * _SECONDS[found[2]]


KeyOption = Annotated[
    list[Path] | None,
    typer.Option("--key", envvar="THINWIRE_KEY", metavar="FILE", help="Sign with this private key; repeatable."),
]
TrustOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--trust", envvar="THINWIRE_TRUST", metavar="FILE",
        help="Accept only what a trust document's keys, or one of these public keys, have signed.",
    ),
]  # fmt: skip
MaxAge = Annotated[
    float | None,
    typer.Option(
        parser=seconds_of, envvar="THINWIRE_MAX_AGE", metavar="TIME",
        help="With --trust: refuse a newest version that nobody has called so for so long, such as 10m.",
    ),
]  # fmt: skip
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache", envvar="THINWIRE_CACHE", metavar="FOLDER",
        help="Share what comes from the store with the other workers of this machine, in this folder.",
    ),
]  # fmt: skip

PeersOption = Annotated[
    str | None,
    typer.Option(
        "--peers", envvar="THINWIRE_PEERS", metavar="PEERS",
        help="Other workers first, then the store: swarm, nixl or mooncake, or swarm://HOST:PORT of a rendezvous.",
    ),
]  # fmt: skip


def trust_of(paths: Sequence[Path] | None, max_age_s: float | None = None) -> Trust | None:
    """What --trust names, or None without it.

    Raises:
        MisuseError: a file cannot be used, or --max-age without --trust.
    """
    if not paths:
        if max_age_s is not None:
            raise MisuseError("--max-age needs --trust: whose word is to be recent?")
        return None
    from thinwire.sync.trust import read_trust

    return read_trust(list(paths), max_age_s=max_age_s)


def examples(*lines: str) -> str:
    """The end of a help text: examples, one a line."""
    return "\n\n".join(["[bold]Examples[/]", *(f"  [cyan]{line}[/]" for line in lines)])


def existing_store(
    url: str, *, cache: Path | None = None, poll_s: float = 0.5, peers: str | Carrier | None = None
) -> Store:
    """The store at ``url`` for reading, see :func:`opened_store`.

    Raises:
        MisuseError: it is a folder that is not there, or nothing here knows such a store.
    """
    if "://" not in url and not Path(url).is_dir():
        raise MisuseError(f"there is no store {url}: no such folder", store=url)
    return opened_store(url, cache=cache, poll_s=poll_s, peers=peers)


def opened_store(
    url: str,
    *,
    cache: Path | None = None,
    poll_s: float = 0.5,
    peers: str | Carrier | None = None,
    publishing: bool = False,
) -> Store:
    """The store at ``url``; its objects are encrypted if THINWIRE_OBJECT_KEY names key files (separated by ``:``), of
    which the first one writes. Behind ``cache``, a folder shared by workers that look every ``poll_s``, and ``peers``;
    what lies in the one and travels between the others is encrypted, too.

    Raises:
        MisuseError: nothing here knows such a store, or a key file cannot be used.
    """
    from thinwire.stores import open_store
    from thinwire.stores.cached import cached

    store, names = open_store(url), os.environ.get("THINWIRE_OBJECT_KEY", "")
    if peers is not None:
        from thinwire.sync.peering import peered

        store = peered(store, peers, publishing=publishing)
    store = cached(store, cache, poll_s=poll_s)
    if not names:
        return store
    from thinwire.stores.encrypted import EncryptedStore, read_object_keys

    return EncryptedStore(store, read_object_keys([name for name in names.split(os.pathsep) if name]))
