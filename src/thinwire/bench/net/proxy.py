"""A line that is long, or loses packets: a proxy for TCP that holds bytes back. It needs no root.

What TCP shows its users of a lost packet is a pause: the bytes behind the gap wait until it is filled. So that is
what the proxy makes: of each packet's worth of bytes (1448) a share of ``loss`` is late by a retransmission time-
out, and what was sent after it in the same direction of the same connection waits, too. A real sender would also
slow down; this one does not, so the effect of loss on the rate of large transfers is **understated**. Delay is
exact to about a millisecond.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import final

from thinwire.errors import MisuseError

__all__ = ["ProxyThread", "TcpProxy"]

_PACKET_BYTES, _CHUNK_BYTES, _CHUNKS_WAITING = 1448, 1 << 16, 4096
_START_S = 20.0


class ProxyThread:
    """A server of asyncio in a thread of its own, as a context manager. Subclasses say what is done with a connection.

    ``address`` is where it listens, once it runs; port 0 takes a free one.
    """

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._asked = host, port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._ready = threading.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: Exception | None = None
        self.address = ("", 0)

    @property
    def endpoint(self) -> str:
        """The address as a URL."""
        return f"http://{self.address[0]}:{self.address[1]}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its beginning to its end."""
        raise NotImplementedError

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self.serve(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            host, port = self._asked
            server = self._loop.run_until_complete(
                asyncio.start_server(self._accept, host, port, limit=_CHUNK_BYTES, backlog=2048)
            )
        except OSError as error:
            self._failure = error
            self._ready.set()
            return
        self.address = server.sockets[0].getsockname()[:2]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    def __enter__(self) -> ProxyThread:
        self._thread.start()
        self._ready.wait(_START_S)
        if self._failure is not None:
            raise MisuseError(f"cannot listen on {self._asked[0]}:{self._asked[1]}: {self._failure}") from self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_START_S)


@final
class TcpProxy(ProxyThread):
    """Forwards connections to ``upstream`` (host, port), both ways ``delay_s`` late and losing a share of ``loss``.

    A round trip takes twice ``delay_s`` longer. ``timeout_s`` is what a lost packet is late by; TCP's least is 0.2.

    Raises:
        MisuseError: a negative delay, or a loss that is no probability below 1.
    """

    def __init__(
        self,
        upstream: tuple[str, int],
        *,
        delay_s: float = 0.0,
        loss: float = 0.0,
        timeout_s: float = 0.2,
        seed: int = 0,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        if delay_s < 0 or timeout_s < 0 or not 0 <= loss < 1:
            raise MisuseError("delay_s and timeout_s are not negative, loss is a probability below 1")
        super().__init__(host=host, port=port)
        self._upstream, self._delay_s, self._loss, self._timeout_s = upstream, delay_s, loss, timeout_s
        self._random = random.Random(seed)
        self.lost = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(*self._upstream, limit=_CHUNK_BYTES)
        try:
            ways = [(reader, up_writer), (up_reader, writer)]
            await asyncio.gather(*(self._carry(*way) for way in ways))
        finally:
            up_writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_CHUNKS_WAITING)

        async def deliver() -> None:
            while True:
                due, data = await waiting.get()
                left = due - time.monotonic()
                if left > 0:
                    await asyncio.sleep(left)
                if not data:
                    if writer.can_write_eof():
                        writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()

        delivery = asyncio.ensure_future(deliver())
        last = 0.0
        try:
            while True:
                data = await reader.read(_CHUNK_BYTES)
                last = max(time.monotonic() + self._delay_s + self._late_s(len(data)), last)
                await waiting.put((last, data))
                if not data:
                    await delivery
                    return
        finally:
            delivery.cancel()

    def _late_s(self, size: int) -> float:
        packets = -(-size // _PACKET_BYTES)
        if self._loss and self._random.random() > (1 - self._loss) ** packets:
            self.lost += 1
            return self._timeout_s
        return 0.0
