"""The Triton kernels select what the oracle does: in Triton's interpreter here, on a GPU with ``-m gpu``.

Whether a kernel is interpreted is decided when it is imported, so that this runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.tensors.test_select import KINDS, same_bits, values
from thinwire.tensors import select_oracle, select_torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton extra")


def _count_fall_backs() -> Callable[[], int]:
    calls = 0
    real = select_torch.top_k

    def counted(x: torch.Tensor, k: int) -> select_torch.Found:
        nonlocal calls
        calls += 1
        return real(x, k)

    select_torch.top_k = counted  # type: ignore[assignment]
    return lambda: calls


def check_all(device: str) -> None:
    from thinwire.tensors import select_triton

    fall_backs, sizes = _count_fall_backs(), (select_triton._NUMEL_MIN, select_triton._NUMEL_MIN + 4097)
    for numel in sizes:
        for kind in KINDS:
            x = values(kind, numel, 3).to(device)
            for k in (0, 1, numel // 100):
                before = fall_backs()
                indices, key, finite = select_triton.top_k(x, k)
                if kind in ("normal", "heavy", "rising"):
                    assert fall_backs() == before + (k == 0), f"the sample misled: {kind} {k}"
                assert torch.equal(indices, select_oracle.top_k(x, k)), (kind, k)
                assert key == (select_oracle.keys(x)[indices.long()].min() if k else 0x7F80_0000)
                assert finite is bool(x.isfinite().all())
    for dtype in (torch.float32, torch.bfloat16):
        for k in (0, 2600):
            gradient, residual = (
                values("heavy", sizes[1], 5).to(device, dtype),
                values("normal", sizes[1], 6).to(device),
            )
            want = select_oracle.accumulate(gradient, residual, 0.37, 1.3)
            for out in (torch.empty_like(residual), residual):
                found = select_triton.accumulate_top_k(gradient, residual, out, k, 0.37, 1.3)
                assert same_bits(out, want)
                assert torch.equal(found[0], select_oracle.top_k(want, k))
                assert torch.equal(select_triton.top_k(gradient, k)[0], select_oracle.top_k(gradient, k))
    print("equal")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_selects_what_the_oracle_does(device: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    code = f"from tests.tensors.test_select_triton import check_all; check_all({device!r})"
    root, command = Path(__file__).parents[2], [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.stdout == "equal\n", done.stderr


_WORDS = ("state", "histogram", "counts", "sums", "indices", "keys", "above", "equal", "above_sums", "equal_sums")
_TYPES = (
    dict.fromkeys(_WORDS, "*i32")
    | {"x": "*fp32", "residual": "*fp32", "scale": "fp32", "keep": "fp32"}
    | dict.fromkeys(("n", "k", "rank", "room"), "i32")
    | dict.fromkeys(("ACCUMULATE", "BLOCK", "BINS", "SIZE"), "constexpr")
)


@pytest.mark.parametrize(
    "name", ["_sample", "_bound", "_count", "_pick_high", "_write", "_pick_low", "_tally", "_finish"]
)
def test_compiles_for_a_gpu_without_one(name: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from thinwire.tensors import select_triton

    kernel = getattr(select_triton, name)
    out = "*i32" if name == "_finish" else "*fp32"
    signature = {argument: _TYPES.get(argument, out) for argument in kernel.arg_names}
    values = {"ACCUMULATE": True, "BLOCK": 4096, "BINS": 1 << 16, "SIZE": 1 << 14}
    constants = {(i,): values[argument] for i, argument in enumerate(kernel.arg_names) if argument in values}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    assert "fma" not in compiled.asm["ptx"]  # the rounding of the sum is torch's
    assert compiled.asm["cubin"]
