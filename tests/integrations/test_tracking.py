"""Trackers inside real trainers: what they log is what a comparison of the weights finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from thinwire.integrations.tracking import log_values, track
from thinwire.probe.tracker import SparsityTracker


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def test_a_tracker_follows_an_optimiser_until_it_is_let_go() -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen: list[Any] = []
    handle = track(SparsityTracker(model, optimizer=optimizer, null=True), optimizer, seen.append)
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        model(torch.ones(4, 8)).sum().backward()
        optimizer.step()
        changed = sum(int((a != b).sum()) for a, b in zip(before, model.parameters(), strict=True))
        assert seen[-1].changed == changed
    values = log_values(seen[-1])
    assert values["sparsity/density_1"] == seen[-1].density
    assert values["sparsity/excess_1"] == pytest.approx(seen[-1].density - values["sparsity/null_1"])
    handle.remove()
    optimizer.step()
    assert len(seen) == 3


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(i)
        tokens = torch.randint(2, 20, (12,), generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def llama() -> Any:
    from thinwire.lab.models import tiny_llama

    return tiny_llama(20, hidden=64, layers=1, dtype=torch.float32, seed=0)


def trainer(folder: Path, callback: Any, *, steps: int, accumulate: int = 1) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "run"), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-4,
        logging_steps=1, report_to="none", use_cpu=True, save_steps=2, gradient_accumulation_steps=accumulate, seed=0,
        disable_tqdm=True,
    )  # fmt: skip
    return transformers.Trainer(llama(), arguments, train_dataset=Rows(), callbacks=[callback])


def test_the_transformers_trainer_logs_what_changed_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from thinwire.integrations.transformers_tracking import SparsityCallback

    callback = SparsityCallback(tmp_path / "sparsity", null=True, lags=(1, 2))
    first = trainer(tmp_path, callback, steps=4, accumulate=2)
    first.train()
    logs = [entry for entry in first.state.log_history if "sparsity/density_1" in entry]
    assert [entry["step"] for entry in logs] == [1, 2, 3, 4]
    assert all(0 < entry["sparsity/density_1"] <= 1 and "sparsity/null_1" in entry for entry in logs)
    assert (tmp_path / "sparsity" / "history.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "sparsity" / "history.parquet").stat().st_size > 0
    again = SparsityCallback(lags=(1, 2), null=True)
    second = trainer(tmp_path, again, steps=5, accumulate=2)
    before = {name: p.detach().clone() for name, p in first.model.named_parameters()}
    second.train(resume_from_checkpoint=True)
    assert again.stats is not None
    assert again.stats.step == 5
    changed = sum(int((before[name] != p).sum()) for name, p in second.model.named_parameters())
    assert again.stats.changed == changed  # against the last step before the checkpoint


def test_trl_takes_the_callback_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    from thinwire.integrations.transformers_tracking import SparsityCallback

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"0123456789", "+", "="])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    callback = SparsityCallback(lags=(1,), null=True, mode="fast")
    config = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", beta=0.0, max_steps=2, num_generations=4,
        per_device_train_batch_size=4, max_completion_length=4, logging_steps=1, learning_rate=1e-4, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    grpo = GRPOTrainer(
        llama(), reward_funcs=reward, args=config, processing_class=tokenizer, callbacks=[callback],
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1 + 2 ="] * 8}),
    )  # fmt: skip
    grpo.train()
    logs = [entry for entry in grpo.state.log_history if "sparsity/density_1" in entry]
    assert len(logs) >= 2
    assert all(0 < entry["sparsity/density_1"] <= 1 for entry in logs[:2])


def test_lightning_logs_a_number_for_each_step_of_the_optimiser(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
    from thinwire.integrations.lightning_tracking import SparsityCallback

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            found: torch.Tensor = self.net(batch[0]).square().mean()
            return found

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def fit(callback: Any, steps: int, checkpoint: str | None = None) -> Any:
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 8)), batch_size=4)
        runner = lightning.Trainer(
            accelerator="cpu", max_steps=steps, callbacks=[callback], default_root_dir=tmp_path, logger=False,
            enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
            enable_checkpointing=False,
        )  # fmt: skip
        runner.fit(Module(), data, ckpt_path=checkpoint)
        return runner

    callback = SparsityCallback(null=True, lags=(1,))
    runner = fit(callback, 3)
    assert callback.stats is not None
    assert callback.stats.step == 3
    assert runner.callback_metrics["sparsity/density_1"] == pytest.approx(callback.stats.density)
    assert len(list(callback.tracker.history.rows())) > 0  # type: ignore[union-attr]
    runner.save_checkpoint(tmp_path / "last.ckpt")
    again = SparsityCallback(null=True, lags=(1,))
    fit(again, 4, str(tmp_path / "last.ckpt"))
    assert again.stats is not None
    assert again.stats.step == 4
