"""``thinwire rendezvous``: where the peers of any number of runs find one another."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from thinwire.cli.options import Json, seconds_of
from thinwire.cli.output import Output

__all__ = ["rendezvous"]


def rendezvous(
    ctx: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 is a free one.")] = 6969,
    timeout: Annotated[
        float | None, typer.Option(parser=seconds_of, metavar="TIME", help="Stop after so long, such as 8h.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Let peers find one another here, until it is stopped.

    It holds no weights, and what it says is proved by those who ask. A publisher has one of its own; this one outlives
    publishers. Name it to all: --peers swarm://HOST:PORT.
    """
    from thinwire.peers.rendezvous import Rendezvous

    output = Output(ctx, as_json=as_json)
    with Rendezvous(host, port) as meeting:
        output.line({"rendezvous": meeting.addresses})
        output.say(f"peers meet at {', '.join(meeting.addresses)}: --peers swarm://{meeting.addresses[0]}")
        began = time.monotonic()
        try:
            while timeout is None or time.monotonic() - began < timeout:
                time.sleep(0.2 if timeout is None else min(0.2, max(began + timeout - time.monotonic(), 0.001)))
        except KeyboardInterrupt:
            output.note("stopped")
