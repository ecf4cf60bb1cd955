"""The standard library's HTTP server with a bound: so many connections at once, one thread each, and no more."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["BoundedServer"]

_log = logging.getLogger(__name__)
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class BoundedServer(ThreadingHTTPServer):
    """Whoever connects when ``connections_max`` others are there is answered 503 at once, by no thread of its own."""

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(
        self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], *, connections_max: int = 256
    ) -> None:
        self._room = threading.BoundedSemaphore(connections_max)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a thread for a connection, if there is room for one."""
        if not self._room.acquire(blocking=False):
            with suppress(OSError):
                request.settimeout(1.0)
                request.sendall(_BUSY)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """A connection's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke, or sent rubbish, is no news."""
        _log.debug("the connection %s from %s ended by an error", request, client_address, exc_info=True)
