"""Names, tied weights and digests of a state."""

from __future__ import annotations

import hashlib

import blake3
import numpy as np
import pytest
import torch

from thinwire.errors import MalformedError, MisuseError
from thinwire.tensors.bits import cells_of
from thinwire.tensors.digest import digest_cells
from thinwire.tensors.tree import state_of
from thinwire.wire.digests import TensorInfo, Tree


def test_tied_weights_are_one_tensor_with_an_alias() -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    state = state_of(model)
    assert list(state.tensors) == ["embed.weight"]
    assert state.aliases == {"head.weight": "embed.weight"}


def test_views_of_one_memory_with_other_shapes_are_tensors_of_their_own() -> None:
    base = torch.zeros(2, 3)
    assert list(state_of({"a": base, "b": base.t(), "c": base[0]}).tensors) == ["a", "b", "c"]


def test_what_is_not_a_tensor_is_refused_by_name() -> None:
    with pytest.raises(MisuseError, match="extra"):
        state_of({"extra": 3})  # type: ignore[dict-item]


@pytest.mark.parametrize("hash_name", ["blake3", "sha256"])
def test_the_digest_is_the_documented_tree_of_hashes(hash_name: str) -> None:
    cells = np.random.default_rng(0).integers(0, 65536, (1 << 20) // 2 + 5, dtype=np.uint16)
    raw = cells.tobytes()

    def h(data: bytes) -> bytes:
        return blake3.blake3(data).digest() if hash_name == "blake3" else hashlib.sha256(data).digest()

    leaves = h(raw[: 1 << 20]) + h(raw[1 << 20 :])
    expected = h(b'thinwire tensor v1\n["BF16",[524293]]\n' + leaves).hex()
    assert digest_cells(hash_name, "BF16", (524293,), cells).digest == expected
    tree = Tree(hash_name, {"w": TensorInfo("BF16", (524293,), expected)}, {})
    text = (
        f'{{"aliases":{{}},"format":"thinwire.tree.v1","hash":"{hash_name}",'
        f'"tensors":[["w","BF16",[524293],"{expected}"]]}}'
    )
    assert tree.encode() == text.encode()
    assert tree.digest == h(text.encode()).hex()


def test_digests_tell_dtype_and_shape_apart() -> None:
    tensor = torch.zeros(6, dtype=torch.int16)
    seen = {digest_cells("blake3", d, s, cells_of(tensor)).digest for d in ("I16", "BF16") for s in ((6,), (2, 3))}
    assert len(seen) == 4


def test_a_tree_in_another_order_or_with_a_dangling_alias_is_refused() -> None:
    info = TensorInfo("U8", (1,), "00" * 32)
    good = Tree("blake3", {"a": info, "b": info}, {}).encode()
    assert Tree.parse(good).tensors["b"] == info
    with pytest.raises(MalformedError):
        Tree.parse(good.replace(b'["a"', b'["c"'))
    with pytest.raises(MalformedError):
        Tree.parse(Tree("blake3", {"a": info}, {"x": "nowhere"}).encode())
