"""The recipe in one process: it learns, repeats itself, goes on after a stop, and refuses what does not fit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from thinwire.errors import MalformedError, MisuseError
from thinwire.lab.config import from_yaml, to_mapping
from thinwire.lab.runlog import read_rows
from thinwire.lab.trainer.compression import compressor_of
from thinwire.lab.trainer.learner import make_optimizer
from thinwire.lab.trainer.options import COMPRESSORS, TrainingOptions
from thinwire.lab.vision.config import VisionConfig
from thinwire.lab.vision.models import SimpleCNN
from thinwire.lab.vision.recipe import train

TINY = VisionConfig(epochs=2, width=8, batch_size=32, train_limit=320, test_limit=60, dropout=0.3, augment="crop")


def test_it_learns_the_digits_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    summary = train(VisionConfig())
    assert summary.accuracy is not None
    assert summary.accuracy > 0.95
    assert summary.finished
    assert (summary.workers, summary.steps, summary.bytes_dense) == (1, 115, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_gives_the_same_weights_and_another_gives_others() -> None:
    torch.manual_seed(123)
    one = train(TINY)
    torch.manual_seed(456)
    assert train(TINY).digest == one.digest
    assert train(replace(TINY, seed=2)).digest != one.digest


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    config = replace(TINY, optimizer=optimizer, precision="bfloat16")
    whole = train(replace(config, out=str(tmp_path / "whole")))
    kept = replace(config, out=str(tmp_path / "run"), resume="auto", checkpoint_every=4)
    for stop, steps in ((3, 3), (3, 3), (10, 10), (14, 14)):  # between, again at once, at an epoch's end, between
        assert train(replace(kept, stop_after=stop)).steps == steps
    last = train(kept)
    assert last.digest == whole.digest
    assert [row.train_loss for row in last.history] == [row.train_loss for row in whole.history]
    assert train(kept).digest == whole.digest  # nothing is left to do
    rows = {name: read_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "run")}
    losses = {name: [(x["step"], x["loss"]) for x in found if x["kind"] == "step"] for name, found in rows.items()}
    assert losses["run"] == losses["whole"]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000016", "step-00000020",
    ]  # fmt: skip


def test_what_a_run_keeps_is_whole(tmp_path: Path) -> None:
    config = replace(TINY, out=str(tmp_path / "run"))
    summary = train(config)
    assert from_yaml(VisionConfig, tmp_path / "run" / "config.yaml", {}) == config
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == json.loads(json.dumps(summary.as_json()))
    model = SimpleCNN((1, 8, 8), 10, width=8)
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "epoch"] == [10, 20]
    assert rows[-1]["accuracy"] == summary.accuracy
    assert {"loss", "lr", "density", "bytes_received", "bytes_sent", "bytes_dense", "seconds"} <= rows[0].keys()
    with pytest.raises(MisuseError, match="holds a run; go on with it by --resume auto"):
        train(config)
    from tests.cli.tools import thinwire

    inspected = thinwire("inspect", tmp_path / "run" / "model.safetensors", "--digest", "--json").json
    assert inspected["state"] == summary.digest


def test_a_batch_in_parts_is_the_batch() -> None:
    config = replace(TINY, dropout=0.0)
    whole, parts = train(config), train(replace(config, accumulate=4))
    assert [row.train_loss for row in parts.history] == pytest.approx(
        [row.train_loss for row in whole.history], rel=1e-3
    )


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_learns_nearly_the_same(precision: str) -> None:
    config = replace(TINY, epochs=1, dropout=0.0)
    exact, low = train(config), train(replace(config, precision=precision))
    assert low.history[0].train_loss == pytest.approx(exact.history[0].train_loss, rel=0.05)
    assert low.digest != exact.digest


def test_label_smoothing_clipping_and_channels_last_change_what_they_should() -> None:
    config = replace(TINY, epochs=4, batch_size=16, train_limit=640, dropout=0.0, augment="none")
    plain = train(config)
    assert plain.history[-1].train_loss < 0.5
    assert train(replace(config, label_smoothing=0.5)).history[-1].train_loss > 1.0
    assert train(replace(config, clip_norm=1e-6)).history[-1].train_loss > 2.2
    assert train(replace(config, clip_norm=1e6)).digest == plain.digest
    assert train(replace(config, channels_last=True)).accuracy == pytest.approx(plain.accuracy, abs=0.05)


def test_only_matrices_decay() -> None:
    model = SimpleCNN((1, 8, 8), 10, width=4)
    decays = {
        id(weight): group["weight_decay"]
        for group in make_optimizer(model, TrainingOptions(weight_decay=0.1)).param_groups
        for weight in group["params"]
    }
    assert {name for name, weight in model.named_parameters() if decays[id(weight)] == 0} == {
        name for name, _ in model.named_parameters() if name.endswith("bias")
    }


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 30, "accumulate": 4}, "not equal"),
        ({"feedback_momentum": 0.9}, "momentum 0"),
        ({"feedback_momentum": 0.9, "momentum": 0.0, "error_feedback": False}, "leave error_feedback on"),
        ({"nesterov": True, "momentum": 0.0}, "needs a momentum"),
        ({"resume": "auto"}, "give out"),
        ({"stop_after": 3}, "give out"),
        ({"log": "wandb"}, "give out"),
        ({"log": "csv"}, "give some of jsonl"),
        ({"data": "imagenet"}, "give digits, mnist"),
        ({"compress": "zip"}, "one of none, topk"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(MisuseError, match=words):
        VisionConfig(**options)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    for options, words in (
        ({"batch_size": 512}, "fewer than a batch"),
        ({"workers": 2}, "start it by thinwire train or torchrun"),
        ({"resume": str(tmp_path)}, "no checkpoint at"),
        *([] if torch.cuda.is_available() else [({"device": "cuda"}, "no CUDA device")]),
    ):
        with pytest.raises(MisuseError, match=words):
            train(replace(TINY, **options))  # type: ignore[arg-type]


def test_checkpoints_of_other_options_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(replace(TINY, out=str(out), stop_after=3))
    with pytest.raises(MisuseError, match="width 8 instead of 4, seed 1 instead of 2"):
        train(replace(TINY, resume=str(out), width=4, seed=2))
    checkpoint = out / "checkpoints" / "step-00000003"
    assert train(replace(TINY, resume=str(out), stop_after=None)).finished  # a run's folder stands for its newest
    for name in ("rank-0.pt", "shared.pt"):
        path = checkpoint / name
        data = path.read_bytes()
        for damaged in (data[:100], b"", b"junk" * 100):
            path.write_bytes(damaged)
            with pytest.raises(MalformedError, match="take an older checkpoint"):
                train(replace(TINY, resume=str(checkpoint)))
        path.write_bytes(data)
    torch.save({"workers": 1, "config": to_mapping(TINY)}, checkpoint / "shared.pt")
    with pytest.raises(MalformedError, match="does not fit this run"):
        train(replace(TINY, resume=str(checkpoint)))
    (checkpoint / "rank-0.pt").unlink()
    with pytest.raises(MalformedError, match=r"rank-0.pt is missing"):
        train(replace(TINY, resume=str(checkpoint)))


class _Runs:
    def __reduce__(self) -> object:
        return (Path.touch, (Path("code-was-run"),))


def test_no_code_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(replace(TINY, out=str(out), stop_after=2))
    torch.save({"workers": 1, "x": _Runs()}, out / "checkpoints" / "step-00000002" / "shared.pt")
    with pytest.raises(MalformedError):
        train(replace(TINY, out=str(out), resume="auto"))
    assert not Path("code-was-run").exists()


def test_a_checkpoint_that_was_never_finished_is_passed_over(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(replace(TINY, out=str(out), stop_after=2))
    (out / "checkpoints" / ".step-00000003.partial").mkdir()
    assert train(replace(TINY, out=str(out), resume="auto", stop_after=3)).steps == 3
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


def test_every_name_stands_for_a_compressor_of_its_own() -> None:
    made = [repr(compressor_of(TrainingOptions(compress=name))) for name in COMPRESSORS]
    assert len(set(made)) == len(COMPRESSORS)
    bare = compressor_of(TrainingOptions(compress="topk", density=0.2, values="int8", error_feedback=False))
    assert repr(bare).startswith("TopK(density=0.2, values=Int8(")


# --- real data -----------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.timeout(1800)
def test_one_epoch_of_mnist_is_more_than_97_per_cent() -> None:
    if "THINWIRE_DATA" not in os.environ:
        pytest.skip("THINWIRE_DATA is not set")
    summary = train(VisionConfig(data="mnist", epochs=1))
    assert summary.accuracy is not None
    assert summary.accuracy > 0.97
