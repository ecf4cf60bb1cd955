"""The recipe on a GPU: half precision, residuals and random states there, and a stop that changes no bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.lab.test_vision_data import write_mnist
from thinwire.lab.vision.config import VisionConfig
from thinwire.lab.vision.recipe import train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, precision: str) -> None:
    write_mnist(tmp_path / "mnist", train=256, test=64, side=16)
    config = VisionConfig(
        data="mnist", data_root=str(tmp_path), model="resnet18", epochs=2, batch_size=32, augment="crop-flip",
        device="cuda", precision=precision, channels_last=True, deterministic=True,
    )  # fmt: skip
    whole = train(config)
    assert whole.device == "cuda:0"
    kept = replace(config, out=str(tmp_path / "run"), resume="auto")
    assert not train(replace(kept, stop_after=5)).finished
    assert train(kept).digest == whole.digest


def test_the_gpu_learns_what_the_cpu_learns(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", train=256, test=64, side=16)
    config = VisionConfig(data="mnist", data_root=str(tmp_path), epochs=1, batch_size=32, deterministic=True)
    losses = [train(replace(config, device=device)).history[0].train_loss for device in ("cpu", "cuda")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
