"""``thinwire serve``: a model that answers HTTP requests and follows a store."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.cli.options import MaxAge, StoreArgument, Threads, TrustOption, existing_store, seconds_of, trust_of
from thinwire.cli.output import Output
from thinwire.cli.watching import LogFormat, LogFormatOption, watching
from thinwire.errors import MisuseError

if TYPE_CHECKING:
    from thinwire.integrations.runtime_sync import SwapReport

__all__ = ["serve"]


def serve(
    ctx: typer.Context,
    store: StoreArgument,
    model: Annotated[
        Path,
        typer.Option("--model", "-m", metavar="DIR", help="A Hugging Face model's folder: configuration, tokenizer."),
    ],
    host: Annotated[str, typer.Option(metavar="IP", help="The address to listen on; 0.0.0.0 is all of them.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in answers; DIR's by default.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute, such as cuda or cuda:1.")] = "cpu",
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused (429).")] = 64,
    timeout: Annotated[
        float, typer.Option(parser=seconds_of, metavar="TIME", help="For a request, the queue included.")
    ] = "2m",  # type: ignore[assignment]
    poll: Annotated[
        float, typer.Option(parser=seconds_of, metavar="TIME", help="Time between two looks for a version.")
    ] = "0.5s",  # type: ignore[assignment]
    trust: TrustOption = None,
    max_age: MaxAge = None,
    log_format: LogFormatOption = LogFormat.text,
    threads: Threads = 0,
) -> None:
    """Serve a model over HTTP, as OpenAI does completions, always at the store's newest version.

    A new version is fetched and proved while requests are answered; between two of them the changed elements are
    written. Every answer names the version and digest that it is from. If THINWIRE_API_KEY is set, requests must bear
    it. Prints a line of JSON with its URL once it serves, and ends on SIGTERM or SIGINT.
    """
    output = Output(ctx, as_json=True)
    pinned = trust_of(trust, max_age)
    opened = existing_store(store)
    with watching(output, log_format=log_format, port=None, address="") as observer:
        from thinwire.integrations.generation import Generator
        from thinwire.integrations.served import load_served
        from thinwire.integrations.serving import Server

        counts, metrics = _metrics()

        def observe(event: Any) -> None:
            for one in (observer, counts):
                if one is not None:
                    one(event)

        def swapped(report: SwapReport) -> None:
            if metrics is not None:
                metrics.paused(report.pause_s)
            output.note(
                f"version {report.version}: ready in {report.prepare_s:.2f} s, pause {report.pause_s * 1e3:.1f} ms"
            )

        served = load_served(model, opened, device=device, trust=pinned)
        generator = Generator(
            served,
            opened,
            queue_max=queue,
            poll_s=poll,
            on_swap=swapped,
            observer=observe,
            trust=pinned,
            threads=threads,
        )
        at = generator.start()
        server = Server(
            generator, address=host, port=port, name=name or model.resolve().name, timeout_s=timeout,
            api_key=os.environ.get("THINWIRE_API_KEY") or None, metrics=metrics,
        )  # fmt: skip
        shown = f"[{host}]" if ":" in host else host
        output.line({"url": f"http://{shown}:{server.server_port}", "version": at.version, "digest": at.digest})

        def stop(*_: Any) -> None:
            threading.Thread(target=server.shutdown, daemon=True).start()  # in this thread it would wait for itself

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            server.serve_forever(poll_interval=0.1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            server.server_close()
            generator.close()


def _metrics() -> tuple[Any, Any]:
    """An observer and the server's own metrics in one registry; None twice without prometheus_client."""
    from thinwire.integrations.metrics import Metrics, ServingMetrics

    try:
        counts = Metrics()
    except MisuseError:
        return None, None
    return counts, ServingMetrics(counts.registry)
