"""``thinwire serve`` as a process: it serves, follows, and ends when it is told to."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.cli.tools import command, environment, thinwire
from thinwire.sync.publisher import Publisher

pytest.importorskip("transformers")
from tests.integrations.tiny_model import greedy, model_of, save_folder


def post(url: str, body: Any, key: str) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Authorization": f"Bearer {key}"}
    )
    with urllib.request.urlopen(request, timeout=240) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


@pytest.mark.slow
def test_it_serves_each_version_and_ends_when_told_to(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "tiny")
    publisher = Publisher(str(tmp_path / "s"))
    models = {version: model_of(version) for version in (1, 2)}
    publisher.publish(models[1])
    words = command("serve", str(tmp_path / "s"), "--model", str(folder), "--port", "0", "--poll", "0.05")
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**environment(), "THINWIRE_API_KEY": "sesame"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        body = {"prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0, "return_token_ids": True}
        for version in (1, 2):
            if version == 2:
                publisher.publish(models[2])
            found = post(url, {**body, "min_version": version}, "sesame")
            assert found["model"] == "tiny"
            assert found["thinwire"]["version"] == version
            assert found["choices"][0]["token_ids"] == greedy(models[version], [5, 6, 7], 6)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            post(url, body, "wrong")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0
        assert "version 2: ready in" in said
    finally:
        process.kill()
        process.wait()


def test_what_cannot_be_served_is_said(tmp_path: Path) -> None:
    began = time.monotonic()
    assert "no such folder" in thinwire("serve", "nowhere", "--model", str(tmp_path), code=2).err
    (tmp_path / "s").mkdir()
    Publisher(str(tmp_path / "s")).publish(model_of(1))
    assert "config.json" in thinwire("serve", str(tmp_path / "s"), "--model", str(tmp_path), code=2).err
    assert time.monotonic() - began < 120
