"""The probe against a real server that says yes to every conditional put: s3rver, a package of npm."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stores.conftest import connect_as
from thinwire.stores import enforces_create

pytestmark = pytest.mark.net


@pytest.fixture
def s3rver_endpoint(tmp_path: Path) -> Iterator[str]:
    program = shutil.which("s3rver")
    if program is None:
        pytest.skip("s3rver is not on the PATH: npm install s3rver@3.7.1")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [program, "-d", str(tmp_path), "-a", "127.0.0.1", "-p", str(port), "--configure-bucket", "weights"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline_s, pause = time.monotonic() + 60, threading.Event()
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=5).close()
                    break
                except OSError:
                    assert server.poll() is None, "s3rver ended"
                    assert time.monotonic() < deadline_s, "s3rver did not start"
                    pause.wait(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def test_a_server_without_conditional_put_is_found_out(s3rver_endpoint: str) -> None:
    store = connect_as("S3RVER", "S3RVER")(s3rver_endpoint)
    store.create("a", [b"first"])
    store.create("a", [b"second"])
    assert store.get("a", size_max=10) == b"second"  # it breaks its word without a sign
    assert not enforces_create(store)
    assert [info.key for info in store.list("")] == ["a"]
