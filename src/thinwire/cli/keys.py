"""``thinwire keygen`` and ``thinwire trust``: keys, who may sign what with them, and the heartbeat."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.cli.options import (
    Json,
    KeyOption,
    StoreArgument,
    TrustOption,
    existing_store,
    opened_store,
    seconds_of,
    trust_of,
)
from thinwire.cli.output import Output
from thinwire.errors import MisuseError, RetryError

if TYPE_CHECKING:
    from thinwire.wire.trust import PublicKey, TrustDocument

__all__ = ["app", "keygen"]

RETRY_S = 30.0

app = typer.Typer(
    name="trust",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Say whose signatures count: trust documents, their rotation, and the heartbeat.",
)


def _create_file(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise MisuseError(f"{path} is there already, and keys are never overwritten; give another name") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def keygen(
    ctx: typer.Context,
    name: Annotated[Path, typer.Argument(help="The private key's file; the public one is NAME.pub.", metavar="NAME")],
    objects: Annotated[
        bool, typer.Option("--objects", help="A secret key that encrypts objects, instead of one that signs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a key: NAME (private, readable by you alone) and NAME.pub. Neither is ever overwritten.

    What is signed with the private key is accepted by who pins the public one. With --objects it is a key for
    THINWIRE_OBJECT_KEY instead, which publisher and consumers share; it has no public part.
    """
    output = Output(ctx, as_json=as_json)
    if objects:
        import secrets

        from thinwire.stores.encrypted import object_key_text

        _create_file(name, object_key_text(secrets.token_bytes(32)).encode(), 0o600)
        output.document({"secret": str(name)})
        output.say(f"{name}: keep it; without it what it encrypts is lost")
        return
    from thinwire.crypto import SigningKey
    from thinwire.wire.signing import key_id, public_text

    key, public = SigningKey.generate(), name.with_name(name.name + ".pub")
    if public.exists():
        raise MisuseError(f"{public} is there already, and keys are never overwritten; give another name")
    _create_file(name, key.pem(), 0o600)
    _create_file(public, public_text(key.public).encode(), 0o644)
    output.document({"private": str(name), "public": str(public), "key_id": key_id(key.public)})
    output.say(f"key {key_id(key.public)}")
    output.say(f"{name} (keep it secret), {public} (give it to consumers)")


# --- trust documents -------------------------------------------------------------------------------------------------


Publics = Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Public key; repeatable.")]
Threshold = Annotated[int, typer.Option(min=1, metavar="N", help="Signatures that a version needs.")]
RootThreshold = Annotated[int, typer.Option(min=1, metavar="N", help="Signatures that a trust document needs.")]
Expires = Annotated[
    float | None, typer.Option(parser=seconds_of, metavar="TIME", help="The document ends so long from now, as 365d.")
]
Signing = Annotated[
    list[Path] | None, typer.Option("--key", metavar="FILE", help="Private root key to sign with; repeatable.")
]
OutFile = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The document's file, to be pinned.")]


def _keys(paths: Sequence[Path] | None, ends: dict[bytes, int | None] | None = None) -> list[PublicKey]:
    from thinwire.sync.trust import read_public
    from thinwire.wire.trust import PublicKey

    found = [read_public(path) for path in paths or ()]
    return [PublicKey(public, (ends or {}).get(public)) for public in found]


def _ends(expires_s: float | None) -> int | None:
    return None if expires_s is None else int(1000 * (time.time() + expires_s))


def _write(output: Output, document: TrustDocument, out: Path, store: str | None) -> None:
    from thinwire.sync.trust import publish_document

    if out.exists():
        raise MisuseError(f"{out} is there already; give another name")
    if store is not None:
        publish_document(opened_store(store), document, retry_s=RETRY_S)
    _create_file(out, document.encode(), 0o644)
    output.document(_described(document))
    output.say(f"{out}: version {document.version}, digest {document.digest}")


def _described(document: TrustDocument) -> dict[str, Any]:
    return {"digest": document.digest, **document.signed(), "signed_by": [s["keyid"] for s in document.signatures]}


@app.command()
def create(
    ctx: typer.Context,
    out: OutFile,
    root: Publics = None,
    publisher: Publics = None,
    compactor: Publics = None,
    heartbeater: Publics = None,
    key: Signing = None,
    threshold: Threshold = 1,
    root_threshold: RootThreshold = 1,
    chain: Annotated[str | None, typer.Option(metavar="NAME", help="Name that every version must carry.")] = None,
    expires: Expires = None,
    store: Annotated[str | None, typer.Option(metavar="STORE", help="Put it beside the chain, too.")] = None,
    as_json: Json = False,
) -> None:
    """Make the first trust document: which keys publish, how many must sign, and which root keys may change that."""
    output = Output(ctx, as_json=as_json)
    from thinwire.sync.trust import first_document, signers_of

    document = first_document(
        root=_keys(root), publisher=_keys(publisher), signers=signers_of(list(key or ())),
        threshold=threshold, root_threshold=root_threshold,
        others={"compactor": _keys(compactor), "heartbeat": _keys(heartbeater)},
        chain=chain, expires_ms=_ends(expires),
    )  # fmt: skip
    _write(output, document, out, store)


@app.command()
def rotate(
    ctx: typer.Context,
    document: Annotated[Path, typer.Argument(help="The trust document that holds now.", metavar="DOCUMENT")],
    out: OutFile,
    root: Publics = None,
    publisher: Publics = None,
    compactor: Publics = None,
    heartbeater: Publics = None,
    key: Signing = None,
    threshold: Threshold = 1,
    root_threshold: RootThreshold = 1,
    expires: Expires = None,
    store: Annotated[str | None, typer.Option(metavar="STORE", help="Put it beside the chain.")] = None,
    as_json: Json = False,
) -> None:
    """Make the next trust document, with the keys that are named and no others: those left out are revoked.

    It is signed by root keys of the old one and of the new one. Consumers find it in the store by themselves.
    """
    output = Output(ctx, as_json=as_json)
    from thinwire.sync.trust import next_document, read_trust, signers_of

    held = read_trust(document).document
    if held.version == 0:
        raise MisuseError(f"{document} is a public key; trust documents are rotated, made by: thinwire trust create")
    made = next_document(
        held, root=_keys(root), publisher=_keys(publisher), signers=signers_of(list(key or ())),
        threshold=threshold, root_threshold=root_threshold,
        others={"compactor": _keys(compactor), "heartbeat": _keys(heartbeater)}, expires_ms=_ends(expires),
    )  # fmt: skip
    _write(output, made, out, store)


@app.command()
def show(
    ctx: typer.Context,
    document: Annotated[Path, typer.Argument(help="A trust document.", metavar="DOCUMENT")],
    as_json: Json = False,
) -> None:
    """Check a trust document, and show its roles and keys."""
    output = Output(ctx, as_json=as_json)
    from thinwire.chain.authority import date_text
    from thinwire.sync.trust import read_trust

    held = read_trust(document).document
    output.document(_described(held))
    end = "never" if held.expires_ms is None else date_text(held.expires_ms)
    output.facts(
        {"version": str(held.version), "digest": held.digest, "chain": held.chain or "any", "ends": end}
        | {
            name: f"{role.threshold} of {', '.join(k[:12] for k in role.keys)}"
            for name, role in sorted(held.roles.items())
        }
    )
    for key in held.keys.values():
        ends = "" if key.expires_ms is None else f", ends {date_text(key.expires_ms)}"
        output.say(f"key {key.id} ed25519 {key.public.hex()}{ends}")


@app.command()
def heartbeat(
    ctx: typer.Context,
    store: StoreArgument,
    key: KeyOption = None,
    trust: TrustOption = None,
    memory: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Remember what was seen, and never go back behind it.")
    ] = None,
    every: Annotated[
        float | None, typer.Option(parser=seconds_of, metavar="TIME", help="Go on, once in so long, such as 30s.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON a heartbeat on stdout.")] = False,
) -> None:
    """Sign that the store's newest version is still the newest, for consumers with --max-age.

    Run it where the store is known to be the right one: whoever renews a heartbeat vouches for what it sees.
    """
    output = Output(ctx, as_json=as_json)
    from thinwire.sync.guard import put_heartbeat
    from thinwire.sync.remote import Remote
    from thinwire.sync.trust import Memory, Trust, signers_of
    from thinwire.wire.trust import TrustDocument

    signers = signers_of(list(key or ()))
    if not signers:
        raise MisuseError("a heartbeat is signed: give --key FILE, or set THINWIRE_KEY")
    opened = existing_store(store)
    pinned = trust_of(trust) or Trust(TrustDocument.of_keys([signer.public for signer in signers]))
    seen = None if memory is None else Memory.open(memory)
    remote = Remote(opened, retry_s=RETRY_S, trust=pinned, memory=seen, in_parts=True)
    while True:
        try:
            newest = remote.newest()
            if newest is None:
                raise MisuseError(f"{opened.url} holds no versions", store=opened.url)
            beat = put_heartbeat(opened, newest, signers, retry_s=RETRY_S)
        except RetryError as error:
            if every is None:
                raise
            output.warn(f"{error}; trying again")
        else:
            output.line({"version": beat.version, "manifest": beat.manifest, "signed_ms": beat.signed_ms})
            output.say(f"version {beat.version} is the newest")
        if every is None:
            return
        time.sleep(every)
