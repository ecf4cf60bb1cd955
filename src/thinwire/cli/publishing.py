"""``thinwire publish``: a checkpoint on disk becomes the next version in a store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from thinwire.cli.options import (
    Dtype,
    Hash,
    HashOption,
    Json,
    KeyOption,
    Level,
    LevelOption,
    PeersOption,
    StoreArgument,
    Threads,
    TrustOption,
    Values,
    ValuesOption,
    opened_store,
    trust_of,
)
from thinwire.cli.output import Output, bytes_text, share_text, watched
from thinwire.errors import MisuseError

__all__ = ["publish"]


def _metadata(items: list[str]) -> dict[str, str]:
    found = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise typer.BadParameter(f"{item!r} is not KEY=VALUE", param_hint="--meta")
        found[key] = value
    return found


def _described(peers: str | None) -> str | None:
    """``peers``, for a publisher that will be gone in a moment: it describes what it wrote, and others seed it.

    Raises:
        MisuseError: they would have to find one another through it.
    """
    if peers is not None and not peers.startswith("swarm://"):
        raise MisuseError(
            f"--peers {peers} needs a publisher that stays. Start a `thinwire rendezvous` and name it here and at the "
            "followers: --peers swarm://HOST:PORT"
        )
    return peers


def publish(
    ctx: typer.Context,
    store: StoreArgument,
    checkpoint: Annotated[
        Path, typer.Argument(help="A safetensors file, or a Hugging Face folder.", show_default=False)
    ],
    step: Annotated[int | None, typer.Option(help="The trainer's step, for the version's manifest.")] = None,
    meta: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="For the manifest; repeatable.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Publish floating-point tensors as this type.")] = None,
    level: LevelOption = Level.small,
    values: ValuesOption = Values.ulp,
    hash_name: HashOption = Hash.blake3,
    anchor_ratio: Annotated[
        float, typer.Option(help="Write a full anchor when patches since the last have so many times its size.")
    ] = 1.0,
    anchor_every: Annotated[int | None, typer.Option(min=1, help="And at the latest after so many versions.")] = None,
    single_publisher: Annotated[
        bool,
        typer.Option("--single-publisher", help="Allow a store that cannot refuse to overwrite: only one may publish."),
    ] = False,
    key: KeyOption = None,
    trust: TrustOption = None,
    adopt: Annotated[
        str | None,
        typer.Option(metavar="DIGEST", help="Go on from the newest version, unsigned as it is, with this manifest."),
    ] = None,
    peers: PeersOption = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Publish a checkpoint as the next version, as a patch against the one before.

    The first version is a full anchor. Nothing happened until the version's manifest is written, at the very end.
    """
    output = Output(ctx, as_json=as_json)
    metadata = _metadata(meta or [])
    from thinwire.sync.checkpoint import open_checkpoint, tensors_of
    from thinwire.sync.files import stage_of
    from thinwire.sync.publisher import Publisher
    from thinwire.tensors.bits import torch_dtype

    opened, tensors = opened_store(store, peers=_described(peers), publishing=True), open_checkpoint(checkpoint)
    with output.bars() as bars:
        publisher = Publisher(
            watched(opened, bars),
            dtype=None if dtype is None else torch_dtype(dtype.value.upper()),
            level=level.value,
            values=values.value,
            hash=hash_name.value,
            anchor_ratio=anchor_ratio,
            anchor_every=anchor_every,
            single_publisher=single_publisher,
            threads=threads,
            key=list(key or ()) or None,
            trust=trust_of(trust),
            adopt=adopt,
        )
        report = publisher.publish(
            tensors_of(tensors.map()), step=step, metadata=metadata, progress=stage_of(bars, "encode")
        )
    output.document(asdict(report))
    output.say(
        f"version {report.version}"
        + (f" (step {report.step})" if report.step is not None else "")
        + f": {report.kind}, {bytes_text(report.total_bytes)} ({share_text(report.total_bytes, report.full_bytes)} of "
        f"{bytes_text(report.full_bytes)}), {share_text(report.changed, report.elements)} of the elements changed; "
        f"{report.seconds['total']:.1f} s"
    )
    output.say(f"state {report.digest}")
