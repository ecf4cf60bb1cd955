"""A Ceph object gateway on loopback: a real S3 server, with a monitor and one OSD that keeps everything in memory.

Needs Debian's packages ``radosgw ceph-mon ceph-osd ceph-common`` and no root. To start one by hand and use it until
Ctrl-C::

    python -m thinwire.bench.net.radosgw
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
PACKAGES = "radosgw ceph-mon ceph-osd ceph-common"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0

CONFIGURATION = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{monitor_port}/0
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
run dir = {folder}
log file = {folder}/$name.log
admin socket = {folder}/$name.asok
pid file =
mon data avail crit = 1
mon allow pool size one = true
mon warn on pool no redundancy = false
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd objectstore = memstore
memstore device bytes = {memory_bytes}
# every pool is made in several rounds of the monitor; by default a round waits for a second
paxos propose interval = 0.05
paxos min wait = 0.01
rgw frontends = beast endpoint=127.0.0.1:{port}
"""

KEYS = {
    "mon.": ["--cap", "mon", "allow *"],
    "client.admin": ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"],
    "osd.0": ["--cap", "mon", "allow profile osd", "--cap", "osd", "allow *", "--cap", "mgr", "allow profile osd"],
    "client.rgw": ["--cap", "mon", "allow rw", "--cap", "osd", "allow rwx"],
}


class RadosGateway:
    """The running server, as a context manager; leaving it ends the processes it started and removes its folder.

    Raises:
        RuntimeError: a program is missing, or a server did not start; the end of its log is in the message.
    """

    access_key_id = "testing"
    secret_access_key = "testing-secret"

    def __init__(self, *, memory_bytes: int = 2 << 30) -> None:
        self._memory_bytes = memory_bytes
        self._servers: list[subprocess.Popen[bytes]] = []
        self.endpoint = ""

    def __enter__(self) -> Self:
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            raise RuntimeError(f"{', '.join(missing)} not found: apt-get install --no-install-recommends {PACKAGES}")
        # not under a long TMPDIR: the path of a Unix socket has at most 107 characters
        self.folder = Path(tempfile.mkdtemp(prefix="rgw-", dir="/tmp"))
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        for server in reversed(self._servers):
            server.terminate()
        for server in reversed(self._servers):
            try:
                server.wait(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait(timeout=STOP_TIMEOUT_S)
        self._servers.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        fsid, osd_id = str(uuid.uuid4()), str(uuid.uuid4())
        port, monitor_port = _free_ports(2)
        settings = {"fsid": fsid, "port": port, "monitor_port": monitor_port, "memory_bytes": self._memory_bytes}
        (self.folder / "ceph.conf").write_text(CONFIGURATION.format(folder=self.folder, **settings))
        for name in ("mon", "osd", "rgw"):
            (self.folder / name).mkdir()
        monitors, keyring = str(self.folder / "monmap"), str(self.folder / "keyring")

        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{monitor_port}]", monitors)
        self._run("ceph-authtool", "--create-keyring", keyring)
        for name, caps in KEYS.items():
            self._run("ceph-authtool", keyring, "--gen-key", "-n", name, *caps)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monitors, "--keyring", keyring)
        self._serve("ceph-mon", "-f", "-i", "a")
        self._run("ceph", "osd", "new", osd_id)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        self._serve("ceph-osd", "-f", "-i", "0")
        keys = [f"--access-key={self.access_key_id}", f"--secret-key={self.secret_access_key}"]
        self._run("radosgw-admin", "user", "create", "--uid=testing", "--display-name=testing", *keys)
        self._serve("radosgw", "-f", "-n", "client.rgw", f"--keyring={keyring}")
        self.endpoint = f"http://127.0.0.1:{port}"
        self._wait_for(lambda: _answers(self.endpoint))

    @property
    def _environment(self) -> dict[str, str]:
        return os.environ | {"CEPH_CONF": str(self.folder / "ceph.conf")}

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, env=self._environment, capture_output=True, timeout=START_TIMEOUT_S, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:3])} failed: {done.stderr.decode(errors='replace')[-2000:]}")

    def _serve(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "wb") as output:
            self._servers.append(
                subprocess.Popen(command, env=self._environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
            )

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        deadline_s, pause = time.monotonic() + START_TIMEOUT_S, threading.Event()
        while not ready():
            ended = [server.args for server in self._servers if server.poll() is not None]
            if ended or time.monotonic() > deadline_s:
                logs = "\n".join(path.read_text(errors="replace")[-1000:] for path in self.folder.glob("*.log"))
                raise RuntimeError(f"the gateway did not start (ended: {ended}):\n{logs}")
            pause.wait(0.05)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


def _answers(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(endpoint, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


if __name__ == "__main__":
    with RadosGateway() as gateway:
        print(f"export AWS_ENDPOINT_URL={gateway.endpoint} AWS_REGION=us-east-1")
        print(f"export AWS_ACCESS_KEY_ID={gateway.access_key_id} AWS_SECRET_ACCESS_KEY={gateway.secret_access_key}")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopping")
