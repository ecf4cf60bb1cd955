"""How things are measured: seconds, memory high-water marks, and the facts about the machine that go into each row."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from thinwire.errors import MisuseError

__all__ = [
    "GIB",
    "Stopwatch",
    "Timing",
    "extra_memory",
    "load",
    "machine",
    "parse_size",
    "seconds",
    "versions",
    "write_rows",
]

GIB = 1 << 30
_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_PACKAGES = ("thinwire", "numpy", "numba", "torch", "zstandard", "pcodec", "blake3")

Row = dict[str, Any]


def parse_size(text: str) -> int:
    """A size in bytes.

    >>> parse_size("64KiB"), parse_size("1.5 GiB")
    (65536, 1610612736)
    """
    number = text.strip().rstrip("BKMGibkmg").strip()
    unit = text.strip()[len(number) :].strip().upper()
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError):
        raise MisuseError(f"not a size: {text!r}; write it as 256MiB or 1GiB") from None


@dataclass(frozen=True, slots=True)
class Timing:
    """Repeated runs of one thing: seconds that passed, and seconds of processor time on all threads together.

    Processor time tells what the work costs when others share the cores.
    """

    runs: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def best(self) -> float:
        """The fastest run: what the machine can do when nobody disturbs it."""
        return min(self.runs)

    @property
    def median(self) -> float:
        """The middle run."""
        return median(self.runs)

    def row(self, state_bytes: int) -> Row:
        """Seconds, and GiB of state a second."""
        return {
            "best_s": round(self.best, 6),
            "median_s": round(self.median, 6),
            "best_gib_s": round(state_bytes / GIB / self.best, 6),
            "median_gib_s": round(state_bytes / GIB / self.median, 6),
            "cpu_s_per_gib": round(min(self.cpu) * GIB / state_bytes, 4),
            "runs": len(self.runs),
        }


class Stopwatch:
    """Collects a :class:`Timing`."""

    def __init__(self) -> None:
        self._runs: list[float] = []
        self._cpu: list[float] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        cpu, began = time.process_time(), time.perf_counter()
        yield
        self._runs.append(time.perf_counter() - began)
        self._cpu.append(time.process_time() - cpu)

    def timing(self) -> Timing:
        """All runs so far."""
        return Timing(tuple(self._runs), tuple(self._cpu))


def seconds(run: Callable[[], object]) -> float:
    """Seconds that ``run()`` takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"no {key} in /proc/self/status")


def extra_memory(run: Callable[[], object]) -> int | None:
    """Bytes by which ``run()`` raises the resident memory of this process at its peak; None where Linux's means lack.

    Freed memory that the allocator kept is given back before, so that it counts when it is used again.
    """
    try:
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
        before = _status("VmRSS")
        run()
        return max(_status("VmHWM") - before, 0)
    except OSError:
        return None


def load() -> float | None:
    """Processes that wanted a core, on average over the last minute, those of this benchmark included."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> Row:
    """Processor, cores at hand, memory, system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu(),
        "cores": cores,
        "memory_gib": round(memory / GIB, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the figures depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
