"""A proxy for HTTP that damages a share of what is fetched: a bit flipped in a body, or the connection cut within one.

Run as ``python -m thinwire.bench.net.faults UPSTREAM PORT SHARE SEED`` it is a process of its own, and ``GET /?counts``
tells what has passed, by kind.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
import urllib.request
from collections import Counter
from typing import final
from urllib.parse import unquote, urlsplit

from thinwire.bench.net.proxy import ProxyThread
from thinwire.errors import MisuseError

__all__ = ["FaultProxy", "counts_of"]

_COUNTS = "/?counts"
_HEAD_MAX = 1 << 16


def counts_of(endpoint: str) -> dict[str, int]:
    """What has passed a proxy that runs at ``endpoint``: requests by kind, ``corrupted``, ``cut``, ``bytes``."""
    with urllib.request.urlopen(endpoint + _COUNTS, timeout=60) as reply:
        found: dict[str, int] = json.loads(reply.read())
    return found


def kind_of(method: str, target: str) -> str:
    """What a request is for: ``list``, ``manifest``, ``object``, ``other``, or a write.

    >>> kind_of("GET", "/weights/run/manifests/0000000001.json"), kind_of("GET", "/weights?list-type=2&prefix=x")
    ('manifest', 'list')
    """
    if method != "GET":
        return method.lower()
    parts = urlsplit(target)
    if "list-type" in parts.query or "list=" in parts.query:
        return "list"
    path = unquote(parts.path)
    for part, kind in (("/manifests/", "manifest"), ("/objects/", "object"), ("/skips/", "object")):
        if part in path:
            return kind
    return "other"


@final
class FaultProxy(ProxyThread):
    """Forwards requests to ``upstream`` (``http://host:port``).

    Of the bodies that are fetched (GET, 200 or 206, not empty) a share of ``share`` is damaged: half of those have one
    bit flipped, the others end half-way with the connection. What is written is never damaged. ``counts`` holds what
    has passed.

    Raises:
        MisuseError: ``share`` is no probability.
    """

    def __init__(
        self, upstream: str, *, share: float = 0.01, seed: int = 0, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        if not 0 <= share <= 1:
            raise MisuseError(f"the share of damaged replies is a probability, not {share}")
        super().__init__(host=host, port=port)
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._share, self._random = share, random.Random(seed)
        self.counts: Counter[str] = Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while head := await _head(reader):
                method, target = head.split(b" ", 2)[:2]
                body = await _body(reader, head)
                if target.decode("ascii", "replace") == _COUNTS:
                    text = json.dumps(self.counts).encode()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
                    await writer.drain()
                    continue
                up = up or await asyncio.open_connection(*self._upstream, limit=_HEAD_MAX)
                up[1].write(head + body)
                await up[1].drain()
                answer = await _head(up[0])
                if not answer or not await self._reply(writer, up[0], answer, method.decode(), target.decode()):
                    return
        finally:
            if up is not None:
                up[1].close()

    async def _reply(
        self, writer: asyncio.StreamWriter, up: asyncio.StreamReader, head: bytes, method: str, target: str
    ) -> bool:
        """Pass a reply on; False if the connection ends with it."""
        status = head.split(b" ", 2)[1]
        none = method == "HEAD" or status in (b"204", b"304")
        body = b"" if none else await _body(up, head, reply=True)
        if not none and _header(head, b"transfer-encoding"):
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"transfer-encoding")]
            head = b"\r\n".join([*lines[:-2], b"Content-Length: %d" % len(body), b"", b""])
        self.counts[kind_of(method, target)] += 1
        self.counts["requests"] += 1
        self.counts["bytes"] += len(head) + len(body)
        damaged = method == "GET" and status in (b"200", b"206") and body and self._random.random() < self._share
        if damaged and self._random.random() < 0.5:
            at = self._random.randrange(len(body))
            body = body[:at] + bytes([body[at] ^ 1 << self._random.randrange(8)]) + body[at + 1 :]
            self.counts["corrupted"] += 1
        elif damaged:
            self.counts["cut"] += 1
            writer.write(head + body[: len(body) // 2])
            await writer.drain()
            return False
        writer.write(head + body)
        await writer.drain()
        return (_header(head, b"connection") or b"").lower() != b"close"


async def _head(reader: asyncio.StreamReader) -> bytes:
    """A request's or a reply's head with the empty line behind it; nothing if the connection has ended."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return b""


def _header(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip()
    return None


async def _body(reader: asyncio.StreamReader, head: bytes, *, reply: bool = False) -> bytes:
    """The body that follows a head, without the marks of its chunks."""
    if (_header(head, b"transfer-encoding") or b"").lower() == b"chunked":
        parts = []
        while size := int((await reader.readline()).split(b";")[0], 16):
            parts.append(await reader.readexactly(size))
            await reader.readexactly(2)
        while (await reader.readline()).strip():
            pass
        return b"".join(parts)
    length = _header(head, b"content-length")
    if length is None:
        return await reader.read(-1) if reply else b""
    return await reader.readexactly(int(length))


if __name__ == "__main__":
    with FaultProxy(sys.argv[1], port=int(sys.argv[2]), share=float(sys.argv[3]), seed=int(sys.argv[4])) as proxy:
        print(proxy.endpoint, flush=True)
        threading.Event().wait()
