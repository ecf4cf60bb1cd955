"""NIXL, NVIDIA's transfer library: InfiniBand, RoCE, TCP and shared memory through UCX, and more by other plug-ins."""

from __future__ import annotations

import base64
import binascii
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from thinwire.errors import MisuseError, RetryError
from thinwire.peers.rdma import Memory

__all__ = ["Nixl", "need"]

_CHUNK_BYTES = 32 << 20
_POLL_S = 0.0005


def need() -> None:
    """Raises MisuseError where NIXL is not installed."""
    _api()


def _api() -> Any:
    try:
        import nixl_cu12
    except ImportError:
        try:
            import nixl  # the package for other versions of CUDA
        except ImportError as error:
            raise MisuseError("peers by NIXL need its package: pip install 'thinwire[nixl]'") from error
        return nixl
    return nixl_cu12


@final
class Nixl:
    """An agent of NIXL's. ``backends``: its plug-ins, ``UCX`` by default; ``UCX_TLS`` chooses UCX's transports."""

    def __init__(self, backends: Sequence[str] = ("UCX",)) -> None:
        api = _api()
        logging.getLogger("nixl").setLevel(logging.WARNING)  # else it writes to stdout what it begins
        self._name = f"thinwire-{secrets.token_hex(8)}"
        self._lock = threading.Lock()  # an agent is not for several threads at once
        try:
            self._agent = api.nixl_agent(self._name, api.nixl_agent_config(backends=list(backends)))
        except Exception as error:
            raise RetryError(f"NIXL did not start: {error}") from error
        self._backends = list(backends)

    def hold(self, memory: Memory) -> tuple[Any, dict[str, Any]]:
        try:
            with self._lock:
                registration = self._agent.register_memory([(memory.address, len(memory), 0, "")], "DRAM")
                agent = self._agent.get_partial_agent_metadata(registration, True, self._backends)
        except Exception as error:
            raise RetryError(f"NIXL cannot register {len(memory)} bytes: {error}") from error
        return registration, {"address": memory.address, "agent": base64.b64encode(agent).decode()}

    def release(self, registration: Any) -> None:
        with self._lock:
            self._agent.deregister_memory(registration)

    def read(
        self, ticket: Mapping[str, Any], memory: Memory, *, progress: Callable[[int], object], stall_s: float
    ) -> None:
        address, agent = ticket.get("address"), ticket.get("agent")
        if type(address) is not int or address <= 0 or not isinstance(agent, str):
            raise RetryError("a ticket of NIXL's without an address")
        registration = None
        try:
            with self._lock:
                registration = self._agent.register_memory([(memory.address, len(memory), 0, "")], "DRAM")
                remote = self._agent.add_remote_agent(base64.b64decode(agent, validate=True))
            name = remote.decode() if isinstance(remote, bytes) else remote
            for start in range(0, len(memory), _CHUNK_BYTES):
                size = min(_CHUNK_BYTES, len(memory) - start)
                self._transfer(memory.address + start, address + start, size, name, stall_s)
                progress(start + size)
        except (RetryError, binascii.Error) as error:
            raise RetryError(f"NIXL did not read {len(memory)} bytes: {error}") from error
        except Exception as error:  # its own kinds have no common base but this
            raise RetryError(f"NIXL did not read {len(memory)} bytes: {type(error).__name__} {error}") from error
        finally:
            if registration is not None:
                self.release(registration)

    def _transfer(self, here: int, there: int, size: int, remote: str, stall_s: float) -> None:
        deadline = time.monotonic() + stall_s
        with self._lock:
            ours = self._agent.get_xfer_descs([(here, size, 0)], "DRAM")
            theirs = self._agent.get_xfer_descs([(there, size, 0)], "DRAM")
            handle = self._agent.initialize_xfer("READ", ours, theirs, remote)
            state = self._agent.transfer(handle)
        try:
            while state == "PROC":
                if time.monotonic() > deadline:
                    raise RetryError(f"no answer for {stall_s:g} s")
                time.sleep(_POLL_S)
                with self._lock:
                    state = self._agent.check_xfer_state(handle)
            if state != "DONE":
                raise RetryError(f"the transfer ended with {state}")
        finally:
            with self._lock:
                self._agent.release_xfer_handle(handle)

    def close(self) -> None:
        with self._lock:
            del self._agent
