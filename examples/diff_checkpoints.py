"""Two checkpoints on disk, the patch between them, and the second one again from the first and the patch.

python examples/diff_checkpoints.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def thinwire(*words: object) -> None:
    """The command, as one would type it."""
    print("$ thinwire", *words)
    subprocess.run([sys.executable, "-m", "thinwire", *map(str, words)], check=True)


def main() -> None:
    torch.manual_seed(0)
    old = {f"layers.{i}.weight": (torch.randn(256, 256) * 0.02).bfloat16() for i in range(4)}
    new = {name: torch.where(torch.rand_like(w.float()) < 0.01, w * 1.01, w) for name, w in old.items()}
    with tempfile.TemporaryDirectory() as folder:
        base, target, patch, again = (Path(folder) / f"{name}.safetensors" for name in ("old", "new", "patch", "again"))
        save_file(old, base)
        save_file(new, target)
        thinwire("diff", base, target, "-o", patch)
        thinwire("apply", base, patch, "-o", again)
        thinwire("inspect", patch)
        restored = load_file(again)
        assert all(torch.equal(restored[name], w) for name, w in new.items())
        print(f"{patch.stat().st_size:,} bytes instead of {target.stat().st_size:,}")


if __name__ == "__main__":
    main()
