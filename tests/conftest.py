"""Shared fixtures. Nothing here needs a network or data from outside."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Workers share the cores: with a full set of OpenMP threads each, they mostly spin, waiting for one another's.
    # Said before anything imports torch, and to all processes that tests start.
    _mine = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(_mine))

pytest.register_assert_rewrite("thinwire.testing")  # failures inside the contracts explain themselves

hypothesis.settings.register_profile("default", deadline=None, max_examples=60, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.register_profile("long", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test writes by accident lands in its own folder."""
    monkeypatch.chdir(str(tmp_path))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests that train small things: two threads would wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
