"""The example is a Flower app that runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "examples" / "federated"


@pytest.mark.slow
def test_the_app_runs_in_one_process(tmp_path):
    command = [sys.executable, str(APP / "local.py"), "--clients", "2", "--rounds", "2", "--out", str(tmp_path / "row")]
    env = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "whole models would have been" in done.stdout
    row = json.loads((tmp_path / "row").read_text())
    assert row["clients"] == 2
    assert row["nbytes"] > 0


def test_flower_finds_the_apps_where_its_file_says(monkeypatch):
    monkeypatch.syspath_prepend(str(APP))
    components = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["components"]
    for name in components.values():
        module, _, attribute = name.partition(":")
        assert getattr(import_module(module), attribute) is not None


def test_without_flower_it_is_said_what_to_install():
    code = (
        "import sys; sys.modules['flwr'] = sys.modules['flwr.app'] = None; import thinwire\n"
        "for name in ('SparseSync', 'SparseSyncMod'):\n"
        "    try:\n        getattr(thinwire, name)\n"
        "    except thinwire.ThinwireError as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("pip install 'thinwire[federated]'") == 2, done.stderr
