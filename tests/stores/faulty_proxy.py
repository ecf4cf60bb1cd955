"""An HTTP proxy that misbehaves on request: what networks and busy servers do to a store."""

from __future__ import annotations

import http.client
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

Kind = Literal[
    "slow-down",
    "error-500",
    "conflict-409",
    "denied-403",
    "moved-301",
    "drop-request",
    "drop-reply",
    "stall",
    "late-600ms",
    "half-reply",
    "huge",
    "no-ranges",
]

_ANSWERS = {
    "slow-down": (503, "SlowDown"),
    "error-500": (500, "InternalError"),
    "conflict-409": (409, "ConditionalRequestConflict"),
    "denied-403": (403, "AccessDenied"),
    "moved-301": (301, "PermanentRedirect"),
}
_WHEN = "Fri, 20 Nov 2026 12:00:00 GMT"


@dataclass
class Rule:
    """The next ``times`` requests of this method (and with this text in the target) go wrong in this way."""

    kind: Kind
    method: str
    times: int
    text: str


class FaultyProxy:
    """Forwards to ``upstream`` (``http://127.0.0.1:port``) unless a rule says otherwise.

    ``seen`` lists method and target of every request, in order of arrival.
    """

    def __init__(self, upstream: str) -> None:
        self.seen: list[tuple[str, str]] = []
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self.released = threading.Event()
        self.upstream = urlsplit(upstream).netloc
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, kind: Kind, *, method: str, times: int = 1, text: str = "") -> None:
        with self._lock:
            self._rules.append(Rule(kind, method, times, text))

    def heal(self) -> None:
        with self._lock:
            self._rules.clear()
            self.seen.clear()

    def decide(self, method: str, target: str) -> Kind | None:
        with self._lock:
            self.seen.append((method, target))
            for rule in self._rules:
                if rule.method == method and rule.text in target and rule.times > 0:
                    rule.times -= 1
                    return rule.kind
        return None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet: a delayed acknowledgement costs 40 ms
    owner: FaultyProxy

    def handle_any(self) -> None:
        kind = self.owner.decide(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if kind in _ANSWERS:
            status, code = _ANSWERS[kind]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as planned</Message></Error>".encode()
            self._reply(status, {"Content-Type": "application/xml"}, b"" if self.command == "HEAD" else text)
            return
        if kind in {"drop-request", "stall"}:
            if kind == "stall":
                self.owner.released.wait(timeout=60)
            self.close_connection = True
            return
        if kind == "huge":
            self.send_response_only(200)
            for name, value in (("Content-Length", str(1 << 42)), ("ETag", '"x"'), ("Last-Modified", _WHEN)):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.flush()
            self.owner.released.wait(timeout=60)
            self.close_connection = True
            return
        if kind == "late-600ms":
            self.owner.released.wait(timeout=0.6)
        status, headers, reply = self._forward(body)
        if kind == "no-ranges":  # the header Range is signed, so the reply is what can be changed
            status = 200
            headers.pop("Content-Range", None)
        if kind == "drop-reply":
            self.close_connection = True
            return
        self._reply(status, headers, reply, cut=kind == "half-reply")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815 (the base class looks for these)

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection(self.owner.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # with its Host, which is signed
                upstream.putheader(name, value)
            upstream.endheaders(body or None)
            response = upstream.getresponse()
            headers = {k: v for k, v in response.getheaders() if k.lower() not in {"transfer-encoding", "connection"}}
            return response.status, headers, response.read()
        finally:
            upstream.close()

    def _reply(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        elif "Content-Length" not in {name.title() for name in headers}:
            self.send_header("Content-Length", "0")
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # the base class's name for it
        """Nothing on the terminal."""
