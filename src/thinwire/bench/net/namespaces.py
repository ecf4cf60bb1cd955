"""Hosts on one machine, each behind a line of limited rate: network namespaces, veth pairs, a bridge, token buckets.

::

    host 0: eth0 10.77.0.1 --tbf-->      port 0 --+
                           <--tbf--               |
    host 1: eth0 10.77.0.2 --tbf-->      port 1 --+-- bridge, in a namespace of its own
                           <--tbf--               |
    ...

Each host sends through a token bucket of its own and receives through another, as behind a full-duplex line into a
switch. Nothing is added to the machine's own namespace, so two networks never collide and none has a way out.

A bucket holds what passes in one millisecond, at least 64 KiB. Larger ones are unfair to benchmarks of small messages:
with the 512 KiB that examples of ``tbf`` show, 2 MB pass a line of "1 Gbit/s" at 1.36 Gbit/s; with 125 kB, at 1.08.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from thinwire.errors import MisuseError, RetryError

__all__ = ["HOSTS_MAX", "Counters", "SlowNetwork", "parse_rate"]

HOSTS_MAX = 250
"""Hosts in one network; their addresses are 10.77.0.1 to 10.77.0.250."""

_PREFIX = "thinwire"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-(\d+)-\d+-(?:switch|\d+)")
_RATE = re.compile(r"(\d+(?:\.\d+)?)(k|m|g)bit")
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}
_BUCKET_S, _BUCKET_BYTES_MIN = 1e-3, 64 << 10
_QUEUE_S = 0.1
_COMMAND_TIMEOUT_S, _END_TIMEOUT_S = 20.0, 5.0
_networks = count()

Process = subprocess.Popen[Any]


@dataclass(frozen=True, slots=True)
class Counters:
    """What a host's line has carried since the network began: whole frames, headers and acknowledgements included."""

    received_bytes: int
    sent_bytes: int

    def __sub__(self, before: Counters) -> Counters:
        return Counters(self.received_bytes - before.received_bytes, self.sent_bytes - before.sent_bytes)


def parse_rate(text: str) -> float | None:
    """Bits a second; None for ``none``, a line without a limit.

    >>> parse_rate("1gbit"), parse_rate("2.5mbit"), parse_rate("none")
    (1000000000.0, 2500000.0, None)

    Raises:
        MisuseError: Not a rate.
    """
    if text == "none":
        return None
    match = _RATE.fullmatch(text.lower())
    if match is None or float(match[1]) == 0:
        raise MisuseError(f"not a rate: {text!r}; write it as 1gbit, 100mbit, 500kbit or none")
    return float(match[1]) * _UNITS[match[2]]


def _command(*words: str, given: str = "") -> str:
    """What the command prints."""
    done = subprocess.run(words, capture_output=True, text=True, input=given, timeout=_COMMAND_TIMEOUT_S, check=False)
    if done.returncode:
        raise RetryError(f"{' '.join(words)}: {done.stderr.strip()}", command=words, exit_code=done.returncode)
    return done.stdout


def _started(pid: int) -> int | None:
    """When process ``pid`` started, in clock ticks since boot: with the pid, it names a process once and for all."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _command("ip", "netns", "list").splitlines() if line.strip()]


def _end(namespace: str) -> None:
    """Remove a namespace, and end the processes in it first: they would keep it alive unseen."""
    deadline = time.monotonic() + _END_TIMEOUT_S
    with suppress(RetryError):  # it may be gone already
        while (pids := _command("ip", "netns", "pids", namespace).split()) and time.monotonic() < deadline:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.01)
        _command("ip", "netns", "del", namespace)


def _sweep() -> None:
    """Remove what processes left behind that were killed before they could tidy up."""
    for name in _namespaces():
        match = _NAME.fullmatch(name)
        if match and _started(int(match[1])) != int(match[2]):
            _end(name)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit meanwhile, so that ``with`` blocks tidy up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class SlowNetwork:
    """A network of ``hosts`` hosts, each behind a line of ``rate`` in both directions (``1gbit``, ``none``, ...).

    The lines of the hosts in ``unlimited`` have no limit: those of servers that many others share.

    ::

        with SlowNetwork(2, "100mbit") as network:
            server = network.run(0, ["python3", "-m", "http.server", "--bind", network.address(0)])
            client = network.run(1, ["curl", "--silent", f"http://{network.address(0)}:8000/"])

    Needs Linux, root and iproute2: ask :meth:`why_not` first. Processes that still run when the block ends are killed.

    Raises:
        MisuseError: Too few or too many hosts, not a rate, or :meth:`why_not` has an answer (at ``with``).
        RetryError: The kernel refused to make the network.
    """

    interface = "eth0"
    """Name of the line inside each host."""

    def __init__(self, hosts: int, rate: str = "1gbit", *, unlimited: Collection[int] = ()) -> None:
        if not 1 <= hosts <= HOSTS_MAX:
            raise MisuseError(f"a network of {hosts} hosts; give 1 to {HOSTS_MAX}", hosts=hosts)
        self.hosts, self.rate, self.unlimited = hosts, rate, frozenset(unlimited)
        self.bits_per_s = parse_rate(rate)
        self._stem = f"{_PREFIX}-{os.getpid()}-{_started(os.getpid())}-{next(_networks)}"

    @staticmethod
    def why_not() -> str | None:
        """Why there can be no such network here; None if there can."""
        if not Path("/proc/self/ns/net").exists():
            return "network namespaces are a feature of Linux"
        for program in ("ip", "tc"):
            if shutil.which(program) is None:
                return f"there is no program {program!r}: install iproute2"
        if os.geteuid() != 0:
            return "making network namespaces needs root"
        probe = f"{_PREFIX}-{os.getpid()}-{_started(os.getpid())}-{next(_networks)}-switch"
        try:
            _command("ip", "netns", "add", probe)
            _command("ip", "-n", probe, "link", "add", "bridge", "type", "bridge")
            return None
        except RetryError as error:
            return f"this kernel or container does not allow it ({error})"
        finally:
            _end(probe)

    def namespace(self, host: int) -> str:
        """Name of a host's namespace, as ``ip netns exec`` takes it."""
        if not 0 <= host < self.hosts:
            raise MisuseError(f"host {host} of {self.hosts}; they count from 0", host=host)
        return f"{self._stem}-{host}"

    def address(self, host: int) -> str:
        """IPv4 address of a host.

        >>> SlowNetwork(3).address(2)
        '10.77.0.3'
        """
        self.namespace(host)
        return f"10.77.0.{host + 1}"

    def run(self, host: int, argv: Sequence[str], env: Mapping[str, str] | None = None, **popen: Any) -> Process:
        """Start ``argv`` on a host. ``env`` is its whole environment, by default ours; ``popen`` goes to Popen."""
        command = ["ip", "netns", "exec", self.namespace(host), *argv]
        return subprocess.Popen(command, env=None if env is None else dict(env), **popen)

    def counters(self, host: int) -> Counters:
        """Bytes that the host's line has carried so far."""
        (line,) = json.loads(_command("ip", "-n", self.namespace(host), "-s", "-j", "link", "show", self.interface))
        return Counters(int(line["stats64"]["rx"]["bytes"]), int(line["stats64"]["tx"]["bytes"]))

    def __enter__(self) -> SlowNetwork:
        reason = self.why_not()
        if reason is not None:
            raise MisuseError(f"no slow network here: {reason}")
        _sweep()
        with ExitStack() as stack:
            stack.enter_context(_stopped_by_signals())
            stack.callback(self.tear_down)
            self._set_up()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _set_up(self) -> None:
        switch = f"{self._stem}-switch"
        _command("ip", "netns", "add", switch)
        _command("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _command("ip", "-n", switch, "link", "set", "bridge", "up")
        for host in range(self.hosts):
            name, line, port = self.namespace(host), self.interface, f"port{host}"
            peer = ("peer", "name", line, "address", _hardware(host), "netns", name)
            _command("ip", "netns", "add", name)
            _command("ip", "-n", switch, "link", "add", port, "type", "veth", *peer)
            _command("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _command("ip", "-n", name, "-batch", "-", given=self._inside(host))
            if self.bits_per_s is not None and host not in self.unlimited:
                for where, device in ((name, line), (switch, port)):
                    _limit(where, device, self.bits_per_s)

    def _inside(self, host: int) -> str:
        """What sets up a host. It knows its neighbours: asking for each of them (ARP) would add to the bytes counted,
        and the kernel has room for 1024 answers only, over all namespaces: too few from 33 hosts on."""
        line = self.interface
        lines = [f"addr add {self.address(host)}/24 dev {line}", f"link set {line} up", "link set lo up"]
        others = (other for other in range(self.hosts) if other != host)
        lines += [f"neigh add {self.address(o)} lladdr {_hardware(o)} dev {line} nud permanent" for o in others]
        return "\n".join(lines) + "\n"

    def tear_down(self) -> None:
        """Remove the network and end what runs on it; what is gone already is left alone."""
        mine = [name for name in _namespaces() if name.startswith(f"{self._stem}-")]
        for name in sorted(mine, key=lambda name: name.endswith("switch")):
            _end(name)


def _hardware(host: int) -> str:
    return f"02:00:0a:4d:00:{host + 1:02x}"  # locally administered, then the last bytes of the address


def _limit(namespace: str, device: str, bits_per_s: float) -> None:
    bucket = max(int(bits_per_s / 8 * _BUCKET_S), _BUCKET_BYTES_MIN)
    limit = ["rate", f"{bits_per_s:.0f}bit", "burst", f"{bucket}b", "latency", f"{_QUEUE_S * 1e3:.0f}ms"]
    _command("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *limit)
