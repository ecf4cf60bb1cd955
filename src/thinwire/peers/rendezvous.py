"""Where peers find one another: a small HTTP server, in the publisher or on its own (``thinwire rendezvous``).

It speaks BitTorrent's tracker protocol (``GET /announce``, BEP 3 and 23) for swarms, and keeps *tickets* for other
carriers: a ticket says how to read one object from one holder, and only carriers understand it. It holds no object,
proves nothing and is believed in nothing: the worst that a false entry does is to cost a reader a time-out.

Everything is bounded: keys, holders of each, bytes of a ticket, time of a request, requests at once.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import random
import re
import socket
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl, quote_from_bytes, unquote_to_bytes

from thinwire.errors import MalformedError, MisuseError, RetryError
from thinwire.peers.http_server import BoundedServer

__all__ = [
    "HINT_KEY",
    "Hint",
    "Rendezvous",
    "Tickets",
    "addresses_of",
    "here",
    "hint_bytes",
    "parse_hint",
    "split_address",
]

HINT_KEY = "peers/rendezvous.json"
"""Where in a store a publisher says how to reach its rendezvous. A hint: whoever follows a false one finds nobody."""

HINT_BYTES_MAX = 4096
KEYS_MAX, HOLDERS_MAX, TICKET_BYTES_MAX = 20_000, 1_000, 64 << 10
_ADDRESSES_MAX, _SHOWN, _TICKETS_SHOWN = 8, 50, 4
_INTERVAL_S, _TTL_S = 30, 100.0
_REQUEST_S, _REQUESTS_MAX = 5.0, 256
_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})", re.ASCII)


def split_address(text: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[v6]:port``.

    Raises:
        MalformedError: it is none.

    >>> split_address("10.0.0.7:6969"), split_address("[::1]:80")
    (('10.0.0.7', 6969), ('::1', 80))
    """
    found = _HOST.fullmatch(text)
    if found is None or not 0 < int(found[2]) < 65536:
        raise MalformedError(f"not an address: {text[:80]!r}; write host:port")
    return found[1].strip("[]"), int(found[2])


def here() -> list[str]:
    """This machine's IPv4 addresses, loopback only if there is no other."""
    found = set()
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                request = name.encode()[:15].ljust(256, b"\0")
                try:
                    found.add(socket.inet_ntoa(fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24]))  # SIOCGIFADDR
                except OSError:  # it has none
                    continue
    except (ImportError, OSError):  # pragma: no cover - not Linux
        found.update(str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET))
    outside = sorted(address for address in found if not ipaddress.ip_address(address).is_loopback)
    return outside or ["127.0.0.1"]


@dataclass(frozen=True, slots=True)
class Hint:
    """What a publisher tells in the store: its rendezvous' addresses, and the key that tickets are made with."""

    addresses: list[str]
    secret: bytes


def hint_bytes(addresses: list[str], secret: bytes = b"") -> bytes:
    """Content of the hint."""
    return json.dumps({"rendezvous": addresses[:_ADDRESSES_MAX], "secret": secret.hex()}).encode()


def parse_hint(data: bytes) -> Hint:
    """What a hint says, each address checked.

    Raises:
        MalformedError: it is none.
    """
    try:
        value = json.loads(data) if len(data) <= HINT_BYTES_MAX else None
    except (ValueError, RecursionError) as error:
        raise MalformedError("the hint to the peers' rendezvous is not JSON") from error
    value = value if isinstance(value, dict) else {}
    found = value.get("rendezvous")
    if not isinstance(found, list) or not 0 < len(found) <= _ADDRESSES_MAX:
        raise MalformedError("the hint to the peers' rendezvous names no addresses")
    if not all(isinstance(address, str) for address in found):
        raise MalformedError("the hint to the peers' rendezvous names no addresses")
    for address in found:
        split_address(address)
    secret = value.get("secret", "")
    try:
        return Hint(found, bytes.fromhex(secret)[:64])
    except (ValueError, TypeError) as error:
        raise MalformedError("the hint to the peers' rendezvous has a key that is none") from error


# --- what is known ---------------------------------------------------------------------------------------------------


class _Table:
    """Holders by key, each with something to show; the oldest keys and holders give way, and silent ones."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, OrderedDict[bytes, tuple[float, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, key: bytes, holder: bytes, shown: Any) -> None:
        with self._lock:
            holders = self._keys.setdefault(key, OrderedDict())
            self._keys.move_to_end(key)
            holders[holder] = (time.monotonic(), shown)
            holders.move_to_end(holder)
            while len(holders) > HOLDERS_MAX:
                holders.popitem(last=False)
            while len(self._keys) > KEYS_MAX:
                self._keys.popitem(last=False)

    def drop(self, key: bytes, holder: bytes) -> None:
        with self._lock:
            self._keys.get(key, OrderedDict()).pop(holder, None)

    def show(self, key: bytes, count: int, *, but: bytes, ttl_s: float) -> list[Any]:
        """What ``count`` holders show, at random; not those unheard of for ``ttl_s``."""
        since = time.monotonic() - ttl_s
        with self._lock:
            holders = self._keys.get(key, OrderedDict())
            found = [shown for holder, (at, shown) in holders.items() if at >= since and holder != but]
        return random.sample(found, min(count, len(found)))


def _bencode(value: int | bytes | dict[bytes, Any]) -> bytes:
    if isinstance(value, int):
        return b"i%de" % value
    if isinstance(value, bytes):
        return b"%d:%s" % (len(value), value)
    return b"d" + b"".join(_bencode(k) + _bencode(value[k]) for k in sorted(value)) + b"e"


class _Handler(BaseHTTPRequestHandler):
    timeout = _REQUEST_S  # of the socket
    protocol_version = "HTTP/1.0"
    server: _Server

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/announce":
            self._announce(query)
        elif path == "/tickets":
            self._tickets(query)
        else:
            self._reply(404, b"")

    def do_POST(self) -> None:
        if self.path != "/tickets":
            return self._reply(404, b"")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > TICKET_BYTES_MAX:
            return self._reply(413, b"")
        try:
            value = json.loads(self.rfile.read(int(length)))
            key, holder, ticket = value["key"], value["holder"], value.get("ticket")
            fine = isinstance(key, str) and isinstance(holder, str) and len(key) <= 512 and len(holder) <= 64
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            fine = False
        if not fine or not (ticket is None or isinstance(ticket, dict)):
            return self._reply(400, b"")
        if ticket is None:
            self.server.tickets.drop(key.encode(), holder.encode())
        else:
            self.server.tickets.add(key.encode(), holder.encode(), ticket)
        return self._reply(200, b"{}")

    def _tickets(self, query: str) -> None:
        given = dict(parse_qsl(query, max_num_fields=8))
        key, but = given.get("key", ""), given.get("but", "")
        found = self.server.tickets.show(key.encode(), _TICKETS_SHOWN, but=but.encode(), ttl_s=float("inf"))
        self._reply(200, json.dumps(found).encode())

    def _announce(self, query: str) -> None:
        fields = [part.partition("=") for part in query.split("&")[:32]]
        given = {name: unquote_to_bytes(value) for name, _, value in fields}
        swarm, peer, port = given.get("info_hash", b""), given.get("peer_id", b""), given.get("port", b"")
        if len(swarm) != 20 or len(peer) != 20 or not port.isdigit() or not 0 < int(port[:6]) < 65536:
            return self._reply(200, _bencode({b"failure reason": b"not an announcement"}))
        if given.get("event") == b"stopped":
            self.server.swarms.drop(swarm, peer)
        else:
            self.server.swarms.add(swarm, peer, _compact(self.client_address[0], int(port)))
        found = self.server.swarms.show(swarm, _SHOWN, but=peer, ttl_s=_TTL_S)
        reply = {
            b"interval": _INTERVAL_S,
            b"peers": b"".join(p for p in found if len(p) == 6),
            b"peers6": b"".join(p for p in found if len(p) == 18),
        }
        return self._reply(200, _bencode(reply))

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line for each request would drown a publisher's own."""


def _compact(host: str, port: int) -> bytes:
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.packed + port.to_bytes(2, "big")


class _Server(BoundedServer):
    def __init__(self, address: tuple[str, int]) -> None:
        self.swarms, self.tickets = _Table(), _Table()
        super().__init__(address, _Handler, connections_max=_REQUESTS_MAX)


class Rendezvous:
    """A rendezvous that serves from now on, until :meth:`close`. ``port`` 0 takes a free one.

    Raises:
        MisuseError: the address cannot be listened on.

    >>> with Rendezvous("127.0.0.1") as meeting:
    ...     tickets = Tickets(meeting.addresses, holder="me")
    ...     tickets.put("objects/1/delta", {"host": "node-7"})
    ...     (found,) = Tickets(meeting.addresses, holder="you").get("objects/1/delta")
    >>> found["host"], found["holder"]
    ('node-7', 'me')
    """

    def __init__(self, host: str = "0.0.0.0", port: int = 0) -> None:
        try:
            self._server = _Server((host, port))
        except (OSError, OverflowError) as error:
            raise MisuseError(f"no rendezvous can listen on {host}:{port}: {error}; choose another") from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="thinwire-rendezvous", daemon=True)
        self._thread.start()
        self.port: int = self._server.server_address[1]
        hosts = here() if host in ("", "0.0.0.0") else [host]
        self.addresses = [f"{each}:{self.port}" for each in hosts[:_ADDRESSES_MAX]]

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# --- asking ----------------------------------------------------------------------------------------------------------


class Tickets:
    """The tickets at a rendezvous, as ``holder`` sees them. Every call ends within a few seconds.

    Each bears a code (HMAC-SHA-256) under ``secret``; others are not handed out.

    Raises:
        RetryError: (any call) no address answers.
    """

    def __init__(self, addresses: list[str], *, holder: str, secret: bytes = b"", timeout_s: float = 2.0) -> None:
        self.addresses, self._holder, self._secret, self._timeout_s = addresses, holder, secret, timeout_s

    def _code(self, key: str, ticket: dict[str, Any]) -> str:
        plain = json.dumps([key, {k: v for k, v in ticket.items() if k != "code"}], sort_keys=True)
        return hmac.new(self._secret, b"thinwire ticket v1\n" + plain.encode(), hashlib.sha256).hexdigest()

    def _is_sound(self, key: str, ticket: object) -> bool:
        code = ticket.get("code") if isinstance(ticket, dict) else None
        return (
            isinstance(code, str)
            and isinstance(ticket, dict)
            and hmac.compare_digest(code.encode(), self._code(key, ticket).encode())
        )

    def put(self, key: str, ticket: dict[str, Any] | None) -> None:
        """Say how ``key`` can be read from this holder; None: not any more."""
        if ticket is not None:
            ticket = {**ticket, "holder": self._holder}
            ticket["code"] = self._code(key, ticket)
        body = json.dumps({"key": key, "holder": self._holder, "ticket": ticket}).encode()
        if len(body) > TICKET_BYTES_MAX:
            raise MisuseError(f"a ticket of {len(body)} bytes; at most {TICKET_BYTES_MAX}")
        self._ask("POST", "/tickets", body)

    def get(self, key: str) -> list[dict[str, Any]]:
        """How others let ``key`` be read, a few of them at random; each has a field ``holder``."""
        query = f"/tickets?key={quote_from_bytes(key.encode())}&but={quote_from_bytes(self._holder.encode())}"
        try:
            found = json.loads(self._ask("GET", query, b""))
        except (ValueError, RecursionError):
            return []
        return [ticket for ticket in found if self._is_sound(key, ticket)] if isinstance(found, list) else []

    def _ask(self, method: str, path: str, body: bytes) -> bytes:
        failed: Exception | None = None
        for address in self.addresses:
            connection = HTTPConnection(*split_address(address), timeout=self._timeout_s)
            try:
                connection.request(method, path, body or None)
                reply = connection.getresponse()
                data = reply.read(_TICKETS_SHOWN * TICKET_BYTES_MAX + 1024)
                if reply.status == 200:
                    return data
                failed = RetryError(f"status {reply.status}")
            except (OSError, HTTPException) as error:
                failed = error
            finally:
                connection.close()
        raise RetryError(f"no rendezvous of peers answers at {', '.join(self.addresses)}: {failed}") from failed


def addresses_of(text: str) -> list[str]:
    """The one address of a rendezvous that a user named.

    Raises:
        MisuseError: it is none.
    """
    try:
        split_address(text)
    except MalformedError as error:
        raise MisuseError(str(error)) from error
    return [text]
