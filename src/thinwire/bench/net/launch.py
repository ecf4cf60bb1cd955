"""Start one process a rank, over a slow network or over loopback, and collect what each of them reports.

A worker is a module run by ``python -m``; it finds its place in the variables that ``torch.distributed`` reads
(``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``), prints what it likes, and ends with :func:`deliver`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.bench.net.namespaces import SlowNetwork
from thinwire.errors import MisuseError, ThinwireError

__all__ = ["RankError", "deliver", "launch", "rank_environment"]

_RESULT = "THINWIRE_RESULT"
_PORT = 29500
_POLL_S, _GRACE_S = 0.05, 0.3
_TAIL_LINES = 15


class RankError(ThinwireError):
    """A rank ended with an error, without a result, or not in time; the others were killed.

    ``facts``: ``rank`` (the first that failed), ``exit_code`` (negative: a signal; None: out of time), ``output``.
    """


def deliver(result: object) -> None:
    """Hand a worker's result, anything JSON can hold, to the process that launched it.

    Raises:
        MisuseError: This process was not started by :func:`launch`.
    """
    if _RESULT not in os.environ:
        raise MisuseError("a result without anybody to take it: workers are started by thinwire.bench.net.launch")
    path = Path(os.environ[_RESULT])
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result))
    unfinished.replace(path)


def rank_environment(rank: int, ranks: int, network: SlowNetwork | None, port: int) -> dict[str, str]:
    """The environment of one rank: this process's own, and where it stands among the others.

    One thread each: ranks share the cores, and libraries that start a thread a core would fight for them.
    """
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": network.address(0) if network else "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": network.interface if network else "lo",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


@dataclass(frozen=True, slots=True)
class _Rank:
    number: int
    process: subprocess.Popen[Any]
    output: Path
    result: Path

    def tail(self) -> str:
        lines = self.output.read_text(errors="replace").strip().splitlines()
        return "\n".join(lines[-_TAIL_LINES:]) or "(it printed nothing)"

    def kill(self) -> None:
        """It and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(
    command: Sequence[str], ranks: int, network: SlowNetwork | None, extra: Mapping[str, str], folder: Path
) -> list[_Rank]:
    port = _PORT if network else _free_port()  # hosts of a slow network have all their ports to themselves
    started: list[_Rank] = []
    try:
        for rank in range(ranks):
            output, result = folder / f"rank-{rank}.txt", folder / f"rank-{rank}.json"
            env = rank_environment(rank, ranks, network, port) | {**extra, _RESULT: str(result)}
            with output.open("wb") as out:
                how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
                if network:
                    process = network.run(rank, command, env, start_new_session=True, **how)
                else:
                    process = subprocess.Popen(command, env=env, start_new_session=True, **how)
            started.append(_Rank(rank, process, output, result))
    except BaseException:
        for each in started:
            each.kill()
        raise
    return started


def _failure(rank: _Rank, ranks: int, what: str) -> RankError:
    said = rank.tail()
    code = rank.process.poll()
    return RankError(
        f"rank {rank.number} of {ranks} {what}; its last lines were:\n{said}",
        rank=rank.number, exit_code=code, output=said,
    )  # fmt: skip


def _wait(started: Sequence[_Rank], timeout_s: float, report: Callable[[str], None]) -> None:
    """Until all have ended well.

    Raises:
        RankError: One has not.
    """
    deadline = time.monotonic() + timeout_s
    shown = 0
    while True:
        codes = [rank.process.poll() for rank in started]
        lines = started[0].output.read_text(errors="replace").split("\n")[:-1]
        for line in lines[shown:]:
            report(line)
        shown = len(lines)
        failed = next((rank for rank, code in zip(started, codes, strict=True) if code), None)
        if failed is not None:
            time.sleep(_GRACE_S)  # its output may still be on the way
            raise _failure(failed, len(started), f"ended with exit code {failed.process.returncode}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            late = next(rank for rank, code in zip(started, codes, strict=True) if code is None)
            raise _failure(late, len(started), f"has not ended after {timeout_s:g} s")
        time.sleep(_POLL_S)


def launch(
    module: str,
    arguments: Sequence[str] = (),
    *,
    ranks: int,
    network: SlowNetwork | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
    report: Callable[[str], None] = lambda _: None,
) -> list[Any]:
    """Run ``python -m module arguments`` once a rank; what each delivered, by rank.

    Rank ``i`` runs on host ``i`` of ``network``, or all on loopback without one. ``env`` is added to the environment
    of :func:`rank_environment`. ``report`` is given the lines that rank 0 prints, as they come. No process is left
    behind, whatever happens.

    Raises:
        MisuseError: The network has fewer hosts than there are ranks.
        RankError: A rank failed; it says which, and its last lines.
    """
    if ranks < 1 or (network is not None and network.hosts < ranks):
        raise MisuseError(f"{ranks} ranks on {network.hosts if network else 'no'} hosts; give one host a rank")
    with tempfile.TemporaryDirectory(prefix="thinwire-ranks-") as folder:
        started = _start([sys.executable, "-m", module, *arguments], ranks, network, env or {}, Path(folder))
        try:
            _wait(started, timeout_s, report)
            for rank in started:
                if not rank.result.exists():
                    raise _failure(rank, ranks, "ended without a result")
            return [json.loads(rank.result.read_text()) for rank in started]
        finally:
            for rank in started:
                rank.kill()
