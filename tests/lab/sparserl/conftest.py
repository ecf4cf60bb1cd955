"""A model of a few thousand weights that has learnt next to nothing, and one thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from thinwire.lab.models import tiny_llama
from thinwire.lab.reasoning import ALPHABET
from thinwire.lab.sparserl.starts import make_start
from thinwire.lab.tasks import CharTokenizer

SETTINGS: dict[str, Any] = {"hidden": 32, "layers": 1, "warm": {"target": 0.0, "batch": 16}}
TASKS = ("count-bits", "gcd")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starts")
    make_start(SETTINGS, "atom", TASKS, 0, folder, problems=16)
    return folder


@pytest.fixture
def atom() -> Any:
    """The model alone, with random weights rounded to bf16."""
    model = tiny_llama(CharTokenizer(ALPHABET).size, dtype=torch.float32, hidden=32, layers=1, seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model
