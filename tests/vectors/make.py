"""Write the test vectors of the format as this release writes it. Files that are there are never rewritten.

python -m tests.vectors.make VERSION
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

import torch

from thinwire.sync.encode import Options, make_patch, take_snapshot
from thinwire.sync.layout import StateSource
from thinwire.tensors.bits import cells_of, dtype_of_tensor, shape_of
from thinwire.tensors.tree import state_of
from thinwire.wire.manifest import DeltaRef, Manifest, ObjectRef, Parent

HERE = Path(__file__).parent
State = dict[str, torch.Tensor]


def described(state: State) -> dict[str, object]:
    """A state as JSON: data type, shape and bytes in hexadecimal."""
    return {n: [dtype_of_tensor(t).name, list(shape_of(t)), cells_of(t).tobytes().hex()] for n, t in state.items()}


def weights(seed: int, size: int) -> torch.Tensor:
    rng = random.Random(seed)
    return torch.tensor([rng.gauss(0, 0.02) for _ in range(size)])


def cases() -> dict[str, tuple[State, State]]:
    masters = weights(1, 4000)
    moved = masters + 2e-6 * torch.sign(weights(2, 4000))
    edges = torch.tensor([0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7FC1, 0x0001, 0x8001], dtype=torch.int32)
    edges = edges.to(torch.int16).view(torch.bfloat16)
    return {
        "adam": ({"w": masters.bfloat16(), "v": masters[:50]}, {"w": moved.bfloat16(), "v": moved[:50]}),
        "edges": ({"e": edges}, {"e": edges.flip(0)}),
        "kinds": (
            {"a": torch.arange(40), "gone": torch.zeros(2), "old": weights(3, 64), "s": torch.tensor(True)},
            {
                "a": torch.arange(40) * -1,
                "new": torch.ones(2, 3).half(),
                "named": weights(3, 64),
                "s": torch.tensor(False),
            },
        ),
        "dense": ({"w": weights(4, 3000)}, {"w": weights(5, 3000)}),
        "nothing": (
            {"w": weights(6, 10), "empty": torch.zeros(0, 4)},
            {"w": weights(6, 10), "empty": torch.zeros(0, 4)},
        ),
    }


def keep(path: Path, data: bytes) -> None:
    if not path.exists():
        path.write_bytes(data)


def main(version: str) -> None:
    folder = HERE / version
    folder.mkdir(exist_ok=True)
    for name, (old, new) in cases().items():
        for level in ("fast", "small", "smallest"):
            for values in ("ulp", "absolute"):
                hash_name = "sha256" if name == "edges" else "blake3"
                snapshot = take_snapshot(StateSource(state_of(old)), hash_name=hash_name)
                patch = make_patch(snapshot, StateSource(state_of(new)), Options(level, values, 1))
                keep(folder / f"{name}-{level}-{values}.safetensors", b"".join(patch.encode()))
        states = json.dumps({"base": described(old), "result": described(new)}) + "\n"
        keep(folder / f"{name}.json", states.encode())
        keep(folder / f"{name}.tree.json", snapshot.tree.encode())
    ref = ObjectRef("objects/0000000002-00/delta.safetensors", 123, hashlib.sha256(b"x").hexdigest())
    manifest = Manifest(
        version=2, state="11" * 32, hash="blake3", parent=Parent(1, "22" * 32), tree=ref,
        deltas=(DeltaRef(1, "33" * 32, ref),), anchor=(), anchor_version=1, step=-7, facts={"elements": 5},
        metadata={"réward": "½"},
    )  # fmt: skip
    keep(folder / "manifest.json", manifest.encode())


if __name__ == "__main__":
    main(sys.argv[1])
