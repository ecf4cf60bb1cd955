"""Frames of version 1 as they were first written; they must be read for ever, and are never rewritten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from thinwire.federated import frame as frames
from thinwire.federated.client import Orders
from thinwire.federated.model import ModelState

PATH = Path(__file__).resolve().parents[1] / "vectors" / "federated-v1.json"


def base() -> ModelState:
    return ModelState.of(
        {
            "w": torch.linspace(-1, 1, 12).reshape(3, 4),
            "h": torch.tensor([1.0, -2.0], dtype=torch.float16),
            "d": torch.tensor(0.5, dtype=torch.float64),
            "steps": torch.tensor(7),
            "none": torch.empty(0),
        }
    )


def result() -> ModelState:
    return base().plus(torch.tensor([1, 5, 13], dtype=torch.int32), torch.tensor([0.25, -1.5, 0.125]))


def written() -> dict[str, str]:
    """What this version of thinwire would write."""
    old, new = base(), result()
    positions, values = torch.tensor([1, 5, 13], dtype=torch.int32), torch.tensor([0.25, -1.5, 0.125])
    made = {"anchor": frames.encode_anchor(new, 3), "cells": frames.encode_cells(new, frames.changed_cells(new, old))}
    for name in frames.VALUES:
        made[f"sparse {name}"] = frames.encode_sparse(
            positions, values, 15, name=name, whole={3: torch.tensor(8)}, sequence=5, base=old.digest
        )
    return {name: data.hex() for name, data in made.items()}


VECTORS = json.loads(PATH.read_text()) if PATH.exists() else {}


@pytest.mark.parametrize("name", ["anchor", "cells", *(f"sparse {name}" for name in frames.VALUES)])
def test_frames_of_version_1_are_read(name):
    frame = frames.parse_frame(bytes.fromhex(VECTORS["frames"][name]))
    if name == "anchor":
        assert frames.decode_anchor(frame).digest.hex() == VECTORS["result"]
        return
    if name == "cells":
        assert frames.decode_cells(frame, base()).digest.hex() == VECTORS["result"]
        return
    assert (frame.sequence, frame.base.hex()) == (5, VECTORS["base"])
    sparse = frames.decode_sparse(frame, base().layout)
    assert sparse.positions.tolist() == [1, 5, 13]
    expected = [0.625, -0.625, 0.625] if name == "sparse sign" else [0.25, -1.5, 0.125]  # the mean magnitude
    np.testing.assert_allclose(sparse.values.numpy(), expected, rtol=1 / 16, atol=0.006)
    assert sparse.whole[3].item() == 8


def test_digests_and_orders_are_those_of_version_1():
    assert base().digest.hex() == VECTORS["base"]
    assert result().digest.hex() == VECTORS["result"]
    assert Orders(0.25, "int8", "ef21", "energy", 77).encode().hex() == VECTORS["orders"]


def test_writing_is_still_the_same():
    assert written() == VECTORS["frames"]
