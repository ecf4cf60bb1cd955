"""The smallest store over a network: a folder behind HTTP, and the store that talks to it. For benchmarks.

Objects are served as they lie in the folder, without TLS, signatures or replicas, so that what is measured is the line
and what is sent over it, and not a server. ``python -m thinwire.bench.net.http_store FOLDER HOST PORT`` serves one.
"""

from __future__ import annotations

import http.client
import json
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, final
from urllib.parse import parse_qs, quote, urlsplit

from thinwire.errors import (
    MisuseError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreUnavailableError,
)
from thinwire.stores.checks import (
    already_there,
    check_list,
    check_range,
    not_there,
    too_large,
    too_short,
    views,
)
from thinwire.stores.local import LocalStore
from thinwire.stores.protocol import Blob, ObjectInfo, Store, check_key

__all__ = ["HttpServer", "HttpStore"]

_TIMEOUT_S = 600.0


@final
class HttpServer:
    """``store`` behind HTTP at ``host`` and ``port`` (0: a free one), as a context manager."""

    def __init__(self, store: Store, *, host: str = "127.0.0.1", port: int = 0) -> None:
        class Handler(_Handler):
            served = store

        self._server = _Threads((host, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def endpoint(self) -> str:
        """Its URL."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def __enter__(self) -> HttpServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=20)


class _Threads(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 0
    served: Store

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {status} -\r\nContent-Length: {headers.get('Size', len(body))}\r\n{lines}\r\n".encode()
        if len(body) < 1 << 16:  # one packet; a delayed acknowledgement of the first of two costs 40 ms
            head, body = head + body, b""
        self.wfile.write(head)
        if body:
            self.wfile.write(body)

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        key, query = parts.path[1:], parse_qs(parts.query, keep_blank_values=True)
        try:
            getattr(self, f"_{self.command.lower()}")(key, query)
        except ObjectNotFoundError:
            self._answer(404)
        except ObjectExistsError:
            self._answer(412)
        except MisuseError as error:
            self._answer(400, str(error).encode())

    do_GET = do_PUT = do_DELETE = do_HEAD = _serve  # noqa: N815 (the base class looks for these)

    def _get(self, key: str, query: dict[str, list[str]]) -> None:
        if not key:
            found = self.served.list(query["list"][0], start_after=query["after"][0])
            self._answer(200, json.dumps([[i.key, i.size, i.modified_s] for i in found]).encode())
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        info = self.served.head(key)
        if wanted is None:
            self._answer(200, self.served.get(key, size_max=info.size))
        elif int(wanted[2]) >= info.size:
            self._answer(416)
        else:
            start = int(wanted[1])
            self._answer(206, self.served.get_range(key, start, int(wanted[2]) + 1 - start))

    def _head(self, key: str, _query: dict[str, list[str]]) -> None:
        info = self.served.head(key)
        self._answer(200, Size=str(info.size), Modified=repr(info.modified_s))

    def _put(self, key: str, _query: dict[str, list[str]]) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        write = self.served.create if self.headers.get("If-None-Match") == "*" else self.served.put
        write(key, [data])
        self._answer(200)

    def _delete(self, key: str, _query: dict[str, list[str]]) -> None:
        self.served.delete(key)
        self._answer(200)

    def log_message(self, format: str, *args: object) -> None:  # the base class's name for it
        """Nothing on the terminal."""


@final
class HttpStore:
    """The store that an :class:`HttpServer` serves at ``endpoint``, or a part of it: ``http://host:port/prefix``.

    One connection a thread, kept open.
    """

    def __init__(self, endpoint: str, *, timeout_s: float = _TIMEOUT_S) -> None:
        self._netloc, self._timeout_s = urlsplit(endpoint).netloc, timeout_s
        self._url = endpoint.rstrip("/")
        path = urlsplit(endpoint).path.strip("/")
        self._prefix = f"{check_key(path)}/" if path else ""
        self._local = threading.local()

    @property
    def url(self) -> str:
        return self._url

    def get(self, key: str, *, size_max: int) -> bytes:
        check_key(key)
        status, data, _ = self._ask("GET", key, size_max=size_max)
        if status == 404:
            raise not_there(self._url, key)
        return data

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_key(key)
        check_range(start, length)
        if length == 0:
            if start > (size := self.head(key).size):
                raise too_short(self._url, key, size, start, length)
            return b""
        status, data, _ = self._ask("GET", key, headers={"Range": f"bytes={start}-{start + length - 1}"})
        if status == 404:
            raise not_there(self._url, key)
        if status == 416:
            raise too_short(self._url, key, None, start, length)
        return data

    def put(self, key: str, data: Blob) -> None:
        self._ask("PUT", check_key(key), body=views(data))

    def create(self, key: str, data: Blob) -> None:
        status, _, _ = self._ask("PUT", check_key(key), body=views(data), headers={"If-None-Match": "*"})
        if status == 412:
            raise already_there(self._url, key)

    def head(self, key: str) -> ObjectInfo:
        status, _, headers = self._ask("HEAD", check_key(key))
        if status == 404:
            raise not_there(self._url, key)
        return ObjectInfo(key, int(headers["Size"]), float(headers["Modified"]))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        check_list(prefix, start_after)
        after = self._prefix + start_after if start_after else ""
        _, data, _ = self._ask("GET", f"?list={quote(self._prefix + prefix)}&after={quote(after)}")
        cut = len(self._prefix)
        try:
            found = [ObjectInfo(key[cut:], size, modified_s) for key, size, modified_s in json.loads(data)]
        except (ValueError, TypeError) as error:  # damaged on its way
            raise StoreUnavailableError(f"{self._url} lists what is no listing: {error}") from error
        return iter(found)

    def delete(self, key: str) -> None:
        self._ask("DELETE", check_key(key))

    def _ask(
        self,
        method: str,
        target: str,
        *,
        body: Sequence[memoryview] | None = None,
        headers: dict[str, str] | None = None,
        size_max: int | None = None,
    ) -> tuple[int, bytes, Any]:
        size = sum(map(len, body or []))
        for last in (False, True):  # a connection that was kept open may have been closed meanwhile
            kept = getattr(self._local, "connection", None)
            connection = kept or http.client.HTTPConnection(self._netloc, timeout=self._timeout_s, blocksize=1 << 20)
            try:
                sent = {**(headers or {}), **({"Content-Length": str(size)} if body is not None else {})}
                path = target if target.startswith("?") else self._prefix + target
                connection.request(method, f"/{path}", body=iter(body) if body is not None else None, headers=sent)
                reply = connection.getresponse()
                if size_max is not None and reply.status == 200 and (reply.length or 0) > size_max:
                    connection.close()
                    self._local.connection = None
                    raise too_large(self._url, target, reply.length or 0, size_max)
                data = reply.read()
                self._local.connection = connection
                if reply.status == 400:
                    raise MisuseError(data.decode(errors="replace"), key=target)
                return reply.status, data, reply.headers
            except (OSError, http.client.HTTPException) as error:
                with suppress(OSError):
                    connection.close()
                self._local.connection = None
                if last or kept is None:
                    raise StoreUnavailableError(f"{target} in {self._url}: {error!r}; try again", key=target) from error
        raise AssertionError("unreachable")

    def __repr__(self) -> str:
        return f"HttpStore({self._url!r})"


if __name__ == "__main__":
    with HttpServer(LocalStore(sys.argv[1], fsync=False), host=sys.argv[2], port=int(sys.argv[3])) as server:
        print(server.endpoint, flush=True)
        threading.Event().wait()
