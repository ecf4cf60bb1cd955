"""The Triton step gives the oracle's bits: in Triton's interpreter here, on a GPU with ``-m gpu``.

Whether a kernel is interpreted is decided when it is imported, so that this runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from thinwire.optim import oracle

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton extra")


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def check_all(device: str) -> None:
    from thinwire.optim import kernels_triton

    random = torch.Generator().manual_seed(0)
    ages = torch.arange(6, dtype=torch.float64)
    rates, corrections = (1e-2 / (1 - 0.9**ages)).float().to(device), (1 - 0.99**ages).sqrt().float().to(device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, scale in ((0, 1.0), (4000, 1.0), (500, 1e-6), (500, 1e-30)):
            weights = (torch.randn(n, generator=random) * scale).to(dtype).to(device)
            positions = (torch.rand(n, generator=random) < 0.3).nonzero().flatten().int().to(device)
            k = positions.numel()
            gradient, m, v = (torch.randn(k, generator=random).to(device) * scale for _ in range(3))
            entered = torch.randint(1, 8, (k,), generator=random, dtype=torch.int32).to(device)
            for masters in (False, True):
                for maximize in (False, True):
                    ends = []
                    for form in (kernels_triton, oracle):
                        w, first, second = weights.clone(), m.clone(), v.square()
                        own = weights[positions.long()].float() + 1e-3 if masters else None
                        step = oracle.AdamStep(rates, corrections, 0.9, 0.99, 1e-8, 0.999, maximize)
                        form.adam(w, positions, gradient, first, second, entered, 7, step, own)
                        ends.append([x for x in (w, first, second, own) if x is not None])
                    for ours, readable in zip(*ends, strict=True):
                        assert torch.equal(bits(ours), bits(readable)), (dtype, n, scale, masters, maximize)
    print("equal")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_is_the_oracles(device: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    code = f"from tests.optim.test_kernels_triton import check_all; check_all({device!r})"
    root, command = Path(__file__).parents[2], [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.stdout == "equal\n", done.stderr


def test_compiles_for_a_gpu_without_one() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from thinwire.optim import kernels_triton

    kernel = kernels_triton._adam
    types = dict.fromkeys(("positions", "entered"), "*i32") | dict.fromkeys(("now", "oldest", "count"), "i32")
    types |= dict.fromkeys(("MASTERS", "BF16", "MAXIMIZE", "BLOCK"), "constexpr")
    values = {"MASTERS": True, "BF16": False, "MAXIMIZE": False, "BLOCK": 1024}
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    constants = {(i,): values[argument] for i, argument in enumerate(kernel.arg_names) if argument in values}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    ptx = compiled.asm["ptx"]
    assert "fma.rn.f32" not in ptx  # each product rounded before it is added, as the oracle has it
    assert "sqrt.rn.f32" in ptx
    assert "div.rn.f32" in ptx
    assert "div.full" not in ptx
    assert compiled.asm["cubin"]
