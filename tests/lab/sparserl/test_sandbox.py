"""Programs that compute pass or fail; programs that want more than that fail, harm nothing, and end."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from thinwire.errors import MisuseError
from thinwire.lab.sparserl.sandbox import Limits, run_tests

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() != "x86_64", reason="needs Linux on x86-64"
)
FAST = Limits(cpu_s=1, wall_s=20)


@pytest.mark.parametrize("program", [
    "assert sum(range(10)) == 45",
    "import collections, functools, hashlib, heapq, itertools, math, re, string, typing\nassert math.gcd(4, 6) == 2",
    "assert open('/proc/self/stat').read()",
    "def f(n): return n if n < 2 else f(n - 1) + f(n - 2)\nassert f(10) == 55",
])  # fmt: skip
def test_what_computes_passes(program: str) -> None:
    assert run_tests(program) == "passed"


@pytest.mark.parametrize("program", [
    "assert False", "raise SystemExit(0)", "import os; os._exit(0)", "def f(): f()\nf()", "(", "\0",
    "x = [0] * 10**10", "import ctypes; ctypes.string_at(0)",
    "import os; os.fork()", "import subprocess; subprocess.run(['true'])",
    "import threading; threading.Thread(target=print).start()",
    "import socket; socket.socket()", "import os; os.kill(os.getppid(), 9)", "import os; os.setuid(1)",
    "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
])  # fmt: skip
def test_what_fails_or_wants_more_fails(program: str) -> None:
    assert run_tests(program, FAST) == "failed"


@pytest.mark.parametrize("harm", [
    "open({file!r}, 'w')", "open({file!r}, 'a').write('x')", "import os; os.remove({file!r})",
    "import os; os.truncate({file!r}, 0)", "import os; os.rename({file!r}, {file!r} + '2')",
    "import os; os.chmod({file!r}, 0)", "import os; os.symlink({file!r}, {file!r} + '2')",
    "import os; os.mkdir({file!r} + '2')", "import os; os.open({file!r}, os.O_RDWR)",
])  # fmt: skip
def test_files_stay_as_they_are(tmp_path: Path, harm: str) -> None:
    file = tmp_path / "kept"
    file.write_text("kept")
    mode = file.stat().st_mode
    assert run_tests(harm.format(file=str(file)), FAST) == "failed"
    assert file.read_text() == "kept"
    assert file.stat().st_mode == mode
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("program", [
    "while True: pass", "while True: print('x' * 10**6)", "try:\n  while True: pass\nexcept BaseException: pass",
])  # fmt: skip
def test_what_computes_for_ever_is_ended(program: str) -> None:
    assert run_tests(program, FAST) == "failed"  # by the limit of processor time


@pytest.mark.parametrize("program", [
    "import time; time.sleep(1000)",
    "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'x' * 10**6)\n  except OSError: pass",
])  # fmt: skip
def test_what_waits_for_ever_is_killed(program: str) -> None:
    assert run_tests(program, Limits(cpu_s=1, wall_s=1.0)) == "timeout"


def test_a_program_cannot_be_too_long_nor_limits_too_small() -> None:
    assert run_tests("#" * (2 << 20)) == "failed"
    for wrong in ({"cpu_s": 0}, {"wall_s": 0.0}, {"memory_bytes": 1}):
        with pytest.raises(MisuseError):
            Limits(**wrong)  # type: ignore[arg-type]
