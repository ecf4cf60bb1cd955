"""A small HTTP server around :class:`~thinwire.integrations.generation.Generator`: a subset of OpenAI's completions,
and the version of the weights in every answer.

==============================  ===================================================================================
``POST /v1/completions``        and ``POST /v1/chat/completions``: a subset of OpenAI's fields, streaming too
``GET /v1/models``              the one model, with its version
``GET /healthz``                200 while requests are answered; what is served, what waits, what is wrong
``GET /metrics``                Prometheus' text, if prometheus_client is installed
==============================  ===================================================================================

Built on the standard library's server, one thread a connection. Connections, headers, bodies, the queue and times are
bounded. There is no TLS: put it behind a proxy where strangers can reach it.
"""

from __future__ import annotations

import hmac
import io
import json
import logging
import queue
import secrets
import select
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any

from thinwire.errors import MisuseError, RetryError
from thinwire.integrations.generation import BusyError, Generator, Job
from thinwire.integrations.openai_api import Asked, chunk, document, parse_body, read_request, version_of
from thinwire.peers.http_server import BoundedServer

__all__ = ["Server"]

_log = logging.getLogger(__name__)
_KINDS = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}
_PATHS = (*_KINDS, "/v1/models", "/healthz", "/metrics")


class _HTTPError(Exception):
    """An answer that is not 200."""

    def __init__(self, code: int, message: str, *, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.code, self.param, self.headers = code, param, headers or {}


class Server(BoundedServer):
    """Answers HTTP requests; ``serve_forever`` until ``shutdown``.

    Args:
        generator: started already.
        address, port: where to listen; port 0 takes a free one (``server_port`` tells).
        name: of the model, in ``/v1/models`` and in answers.
        api_key: a token that requests must bear (``Authorization: Bearer ...``), but for ``/healthz``; None asks none.
        timeout_s: for a request from its last byte to its answer, the queue included.
        read_timeout_s: for a request's bytes to arrive.
        body_bytes_max, connections_max: more are refused (413, 503).
        metrics: a :class:`~thinwire.integrations.metrics.ServingMetrics`; None answers ``/metrics`` with 404.

    Raises:
        MisuseError: the address and port cannot be had.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        address: str = "127.0.0.1",
        port: int = 8000,
        name: str = "thinwire",
        api_key: str | None = None,
        timeout_s: float = 120.0,
        read_timeout_s: float = 30.0,
        body_bytes_max: int = 1 << 20,
        connections_max: int = 256,
        metrics: Any = None,
    ) -> None:
        self.generator, self.name, self.api_key, self.metrics = generator, name, api_key, metrics
        self.timeout_s, self.read_timeout_s, self.body_bytes_max = timeout_s, read_timeout_s, body_bytes_max
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            super().__init__((address, port), _Handler, connections_max=connections_max)
        except OSError as error:
            raise MisuseError(f"cannot listen on {address} port {port}: {error}", port=port) from error

    def state(self) -> dict[str, Any]:
        """What is served, for ``/healthz``."""
        generator = self.generator
        at = generator.at
        return {
            "status": "ok" if generator.trouble is None else "following is troubled", "trouble": generator.trouble,
            "waiting": generator.waiting, "ready": generator.sync.ready, "proved": generator.proved,
            "pause_s": at.pause_s, "prepare_s": at.prepare_s, **version_of(at),
        }  # fmt: skip


class _Timed(io.RawIOBase):
    """A connection's bytes, all of them before a deadline, however slowly they come."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.deadline = connection, time.monotonic()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not arrive in time")
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "thinwire", ""
    server: Server

    def setup(self) -> None:
        super().setup()
        self._timed = _Timed(self.connection)
        self.rfile = io.BufferedReader(self._timed)
        self.code = 0

    def handle_one_request(self) -> None:
        self._timed.deadline = time.monotonic() + self.server.read_timeout_s
        super().handle_one_request()

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)

    def do_GET(self) -> None:
        self._handle(self._get)

    def do_POST(self) -> None:
        self._handle(self._post)

    def _handle(self, work: Any) -> None:
        self.path = self.path.partition("?")[0]
        began, self.code, self._begun = time.perf_counter(), 500, False
        try:
            self._authorise()
            work()
        except _HTTPError as error:
            self._refuse(error)
        except MisuseError as error:
            self._refuse(_HTTPError(400, str(error), param=str(error.facts.get("param") or "") or None))
        except BusyError as error:
            self._refuse(_HTTPError(429, str(error), headers={"Retry-After": "1"}))
        except RetryError as error:
            self._refuse(_HTTPError(504, str(error)))
        except OSError:  # the client has gone, or was too slow
            self.close_connection = True
            self.code = 499
        except Exception:
            _log.exception("a request failed inside")
            self._refuse(_HTTPError(500, "the request failed inside the server; its log says why"))
        if self.server.metrics is not None:
            path = self.path if self.path in _PATHS else "other"
            self.server.metrics.request(path, self.code, time.perf_counter() - began)

    def _authorise(self) -> None:
        key = self.server.api_key
        if key is None or self.path == "/healthz":
            return
        given = self.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode("utf-8", "replace"), f"Bearer {key}".encode()):
            self.close_connection = True  # what follows has not been read
            raise _HTTPError(401, "a key is needed: Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})

    def _get(self) -> None:
        if self.path == "/healthz":
            self._send(200, self.server.state())
        elif self.path == "/v1/models":
            at = self.server.generator.at
            model = {"id": self.server.name, "object": "model", "owned_by": "thinwire", **version_of(at)}
            self._send(200, {"object": "list", "data": [model]})
        elif self.path == "/metrics" and self.server.metrics is not None:
            self.server.metrics.generated(0, self.server.generator.waiting)
            self._send(200, self.server.metrics.text(), kind="text/plain; version=0.0.4; charset=utf-8")
        else:
            raise _HTTPError(405 if self.path in _KINDS else 404, f"there is nothing at {self.path[:100]} to get")

    def _post(self) -> None:
        body = self._body()
        if self.path not in _KINDS:
            raise _HTTPError(404, f"there is nothing at {self.path[:100]} to post to")
        asked = read_request(parse_body(body), _KINDS[self.path], self.server.generator.served)
        number = f"{'chatcmpl' if asked.kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
        parts: queue.SimpleQueue[tuple[int, str, list[int]]] | None = queue.SimpleQueue() if asked.stream else None
        job = self.server.generator.submit(
            asked.request, timeout_s=self.server.timeout_s,
            delta=None if parts is None else lambda index, text, tokens: parts.put((index, text, list(tokens))),
        )  # fmt: skip
        try:
            if parts is None:
                self._whole(asked, job, number)
            else:
                self._stream(asked, job, number, parts)
        finally:
            job.cancel()
        if self.server.metrics is not None and job.answer is not None:
            made = sum(len(choice.tokens) for choice in job.answer.choices)
            self.server.metrics.generated(made, self.server.generator.waiting)

    def _body(self) -> bytes:
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise _HTTPError(411, "send a Content-Length instead of a Transfer-Encoding")
        text = self.headers.get("Content-Length", "")
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            self.close_connection = True
            raise _HTTPError(411, "a Content-Length is needed")
        if int(text) > self.server.body_bytes_max:
            self.close_connection = True
            raise _HTTPError(413, f"a body may have {self.server.body_bytes_max} bytes")
        data = self.rfile.read(int(text))
        if len(data) != int(text):
            raise ConnectionError("the body ended early")
        return data

    def _waits(self, job: Job) -> Iterator[None]:
        """Until the job is done; ends it when the client has gone."""
        while not job.wait(0.05):
            if self._gone():
                job.cancel()
                raise ConnectionError("the client has gone")
            yield

    def _gone(self) -> bool:
        try:
            ready, _, _ = select.select([self.connection], [], [], 0)
            return bool(ready) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True

    def _whole(self, asked: Asked, job: Job, number: str) -> None:
        for _ in self._waits(job):
            pass
        answer = job.result()
        found = document(asked, answer, self.server.generator.served, name=self.server.name, number=number)
        self._send(200, found, version=answer)

    def _stream(self, asked: Asked, job: Job, number: str, parts: Any) -> None:
        """Server-sent events, as they are made; the first one waits for the first token, so that errors have a code."""
        waits = self._waits(job)

        def send_all() -> None:
            while not parts.empty():
                index, text, tokens = parts.get()
                if not self._begun:
                    self._begin(200, "text/event-stream", version=job.started)
                self._event(chunk(asked, job.started, index, text, tokens, None, name=self.server.name, number=number))

        for _ in waits:
            send_all()
        answer = job.result()
        send_all()
        if not self._begun:
            self._begin(200, "text/event-stream", version=answer)
        for index, choice in enumerate(answer.choices):
            self._event(chunk(asked, answer, index, "", [], choice.finish, name=self.server.name, number=number))
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    # --- sending -----------------------------------------------------------------------------------------------------

    def _begin(self, code: int, kind: str, *, version: Any = None, length: int | None = None) -> None:
        self._begun, self.code = True, code
        self.connection.settimeout(self.server.read_timeout_s)
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        if version is not None:
            self.send_header("X-Thinwire-Version", str(version.version))
            self.send_header("X-Thinwire-Digest", version.digest)
        if length is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _send(self, code: int, value: Any, *, kind: str = "application/json", version: Any = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self._begin(code, kind, version=version, length=len(data))
        self.wfile.write(data)

    def _event(self, value: Any) -> None:
        self._chunk(f"data: {json.dumps(value)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _refuse(self, error: _HTTPError) -> None:
        self.code = error.code
        if self._begun:  # in the middle of a stream nothing can be said any more
            self.close_connection = True
            return
        kind = "invalid_request_error" if error.code < 500 else "server_error"
        data = json.dumps(
            {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
        ).encode()
        with suppress(OSError):
            self.connection.settimeout(self.server.read_timeout_s)
            self.send_response(error.code)
            for name, value in error.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
