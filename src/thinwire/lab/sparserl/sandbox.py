"""Runs Python that a model wrote, and tells whether its tests pass; it can harm nothing and does not run for ever.

The program runs in an interpreter of its own, isolated and without site packages, under limits of the kernel: processor
time, memory, and a filter of system calls (seccomp) that lets it compute, read files, and nothing else. Opening a file
for writing, removing one, sockets, processes and threads fail with EPERM. Whatever it does, it is killed when the wall
clock's limit is over.

What it does not do: hide files that this user may read, or stop a program that looks for the token of success in the
interpreter's frames. It needs Linux on x86-64.
"""

from __future__ import annotations

import os
import platform
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from thinwire.errors import MisuseError

__all__ = ["Limits", "Verdict", "run_tests"]

Verdict = Literal["passed", "failed", "timeout"]
_SOURCE_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds of processor time and of the wall clock, bytes of address space."""

    cpu_s: int = 5
    wall_s: float = 10.0
    memory_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        if self.cpu_s < 1 or self.wall_s <= 0 or self.memory_bytes < 64 << 20:
            raise MisuseError("give 1 s of processor time, some wall time and 64 MiB of memory at least")


# Numbers of system calls on x86-64 that computing and reading need. 257, openat, is looked at closer.
_ALLOWED = (
    0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 19, 20, 21, 24, 25, 28, 32, 33, 35, 39, 60, 63, 72, 79,
    89, 96, 98, 99, 102, 104, 107, 108, 131, 186, 201, 202, 204, 217, 228, 229, 230, 231, 262, 267, 271, 273, 318,
    332, 334,
)  # fmt: skip
_BOOT = """
import sys, resource, ctypes, struct, os
cpu, memory, allowed = {cpu}, {memory}, {allowed}
source = sys.stdin.buffer.read().decode()
token, _, source = source.partition("\\n")
result = os.dup(1)
quiet = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(quiet, fd)
sys.stdin = sys.stdout = sys.stderr = open(os.devnull, "r+")
for limit, value in ((resource.RLIMIT_CPU, cpu), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0),
                     (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64)):
    resource.setrlimit(limit, (value, value))
jump, load, equal, both, give = 0x05, 0x20, 0x15, 0x45, 0x06
deny, allow, kill = 0x00050001, 0x7FFF0000, 0x80000000
program = [(load, 0, 0, 4), (equal, 1, 0, 0xC000003E), (give, 0, 0, kill), (load, 0, 0, 0)]
program += [(equal, 0, 4, 257), (load, 0, 0, 32), (both, 0, 1, 0o1 | 0o2 | 0o100 | 0o1000), (give, 0, 0, deny),
            (give, 0, 0, allow)]
for number in allowed:
    program += [(equal, 0, 1, number), (give, 0, 0, allow)]
program += [(give, 0, 0, deny)]
code = b"".join(struct.pack("HBBI", *step) for step in program)
held = ctypes.create_string_buffer(code)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
filter = Program(len(program), ctypes.addressof(held))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(filter), 0, 0):
    os.write(result, b"no filter")
    os._exit(3)
def run(source):
    exec(compile(source, "answer", "exec"), {{"__name__": "__main__"}})
run(source)
os.write(result, token.encode())
os._exit(0)
"""


def run_tests(program: str, limits: Limits | None = None) -> Verdict:
    """Whether ``program`` runs to its end: ``failed`` if it raises, exits, or breaks a limit, ``timeout`` if
    the wall clock's limit ended it.

    Raises:
        MisuseError: not on Linux on x86-64, or the kernel refuses the filter.

    >>> run_tests("assert sorted([2, 1]) == [1, 2]"), run_tests("assert False"), run_tests("import os; os._exit(0)")
    ('passed', 'failed', 'failed')
    """
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        raise MisuseError("running a model's code needs Linux on x86-64, whose system calls can be filtered here")
    limits = limits or Limits()
    source = program.encode(errors="replace")
    if len(source) > _SOURCE_BYTES_MAX:
        return "failed"
    boot = _BOOT.format(cpu=limits.cpu_s, memory=limits.memory_bytes, allowed=_ALLOWED)
    token = secrets.token_hex(16)
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", boot], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env={}, cwd="/", start_new_session=True, close_fds=True,
    )  # fmt: skip
    assert process.stdin is not None  # both are pipes
    assert process.stdout is not None
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(token.encode() + b"\n" + source)
            process.stdin.close()
        try:
            process.wait(limits.wall_s)
        except subprocess.TimeoutExpired:
            return "timeout"
        said = os.read(process.stdout.fileno(), 64)  # no more: the program may have filled the pipe
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    if said == b"no filter":
        raise MisuseError("the kernel refuses to filter system calls (seccomp), so a model's code is not run here")
    return "passed" if said == token.encode() and process.returncode == 0 else "failed"
