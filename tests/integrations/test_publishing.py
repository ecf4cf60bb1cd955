"""Publishing out of real trainers, while a worker follows: what it holds is what the trainer had, bit for bit."""

from __future__ import annotations

import copy
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thinwire
from tests.integrations.test_tracking import Rows, llama, tiny
from thinwire.errors import ConflictError, MisuseError, RetryError, StoreUnavailableError
from thinwire.integrations.gathering import gathered_state, unwrapped
from thinwire.integrations.publishing import Publishing, log_values, state_to_publish
from thinwire.stores.memory import MemoryStore

pytestmark = pytest.mark.usefixtures("one_thread")


def fresh() -> str:
    return f"memory://{uuid.uuid4().hex}"


def as_served(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone().to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def loaded(store: Any, like: Mapping[str, torch.Tensor], version: int | None = None) -> dict[str, torch.Tensor]:
    held = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    thinwire.Consumer(store).load(held, version=version)
    return held


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[n].view(torch.int16), b[n].view(torch.int16)) for n in a)


class Worker:
    """Follows a store in a thread and keeps what it held at each step."""

    def __init__(self, store: str, like: Mapping[str, torch.Tensor], last_step: int) -> None:
        self.held: dict[int, dict[str, torch.Tensor]] = {}
        self._args = store, {name: torch.zeros_like(tensor) for name, tensor in like.items()}, last_step
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        store, model, last = self._args
        consumer = thinwire.Consumer(store, poll_s=0.01)
        self._keep(consumer.load(model, timeout_s=60).step, model)
        for version in consumer.follow(every=True, timeout_s=60):
            self._keep(version.apply(model).step, model)
            if version.step == last:
                return

    def _keep(self, step: int | None, model: Mapping[str, torch.Tensor]) -> None:
        assert step is not None
        self.held[step] = {name: tensor.clone() for name, tensor in model.items()}

    def join(self) -> None:
        self._thread.join(timeout=120)
        assert not self._thread.is_alive()


def keeper() -> Any:
    """A callback that keeps the weights after each step, as they are served."""
    from transformers import TrainerCallback

    class Keeper(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.kept: dict[int, dict[str, torch.Tensor]] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.kept[state.global_step] = as_served(kwargs["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.kept[state.global_step] = as_served(kwargs["model"])

    return Keeper()


def trainer(folder: Path, callbacks: list[Any], *, steps: int, model: Any = None, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "run"), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3,
        logging_steps=1, report_to="none", use_cpu=True, save_steps=2, seed=0, disable_tqdm=True, **settings,
    )  # fmt: skip
    return transformers.Trainer(model or llama(), arguments, train_dataset=Rows(), callbacks=callbacks)


def test_a_worker_follows_the_transformers_trainer_bit_for_bit_while_it_trains(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from thinwire.integrations.transformers_publishing import PublishCallback

    store, kept = fresh(), keeper()
    callback = PublishCallback(store, level="smallest", metadata={"run": "a"})
    run = trainer(tmp_path, [callback, kept], steps=5, gradient_accumulation_steps=2)
    worker = Worker(store, as_served(run.model), 5)
    run.train()
    worker.join()
    assert sorted(worker.held) == [0, 1, 2, 3, 4, 5]
    assert all(same(worker.held[step], kept.kept[step]) for step in worker.held)
    assert callback.report is not None
    assert (callback.report.version, callback.report.step) == (6, 5)
    logged = [entry for entry in run.state.log_history if "publish/version" in entry]
    assert logged
    assert all(0 < entry["publish/density"] <= 1 for entry in logged)
    newest = thinwire.Consumer(store)
    newest.load(as_served(run.model))
    assert newest._held is not None
    assert newest._held.metadata == {"run": "a"}


def test_every_second_step_the_last_one_and_a_run_that_is_resumed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from thinwire.integrations.transformers_publishing import PublishCallback

    store = fresh()
    first = trainer(tmp_path, [PublishCallback(store, every=2)], steps=5)
    first.train()
    again = PublishCallback(store, every=2)
    second = trainer(tmp_path, [again], steps=6)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))  # not from 5, which is published too
    model = as_served(second.model)
    consumer = thinwire.Consumer(store)
    steps = [consumer.load(copy.deepcopy(model), version=version).step for version in range(1, 7)]
    assert steps == [0, 2, 4, 5, 4, 6]
    assert same(loaded(store, model), model)
    assert same(loaded(store, model, 3), loaded(store, model, 5))  # the same checkpoint


def grpo(folder: Path, callbacks: list[Any], *, algorithm: str = "GRPO", **more: Any) -> Any:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"0123456789", "+", "="])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    config = getattr(trl, f"{algorithm}Config")(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", beta=0.0, max_steps=2, num_generations=4,
        per_device_train_batch_size=4, max_completion_length=4, logging_steps=1, learning_rate=1e-3, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    return getattr(trl, f"{algorithm}Trainer")(
        llama(), reward_funcs=reward, args=config, processing_class=tokenizer, callbacks=callbacks,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1 + 2 ="] * 8}), **more,
    )  # fmt: skip


def adapter_config() -> Any:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("algorithm", ["GRPO", pytest.param("RLOO", marks=pytest.mark.slow)])
def test_trl_publishes_all_weights(algorithm: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from thinwire.integrations.transformers_publishing import PublishCallback

    store = fresh()
    run = grpo(tmp_path, [PublishCallback(store)], algorithm=algorithm)
    run.train()
    model = as_served(run.model)
    assert same(loaded(store, model), model)
    steps = [thinwire.Consumer(store).load(copy.deepcopy(model), version=v).step for v in (1, 2, 3)]
    assert steps == [0, 1, 2]
    assert not same(loaded(store, model, 1), model)


def test_trl_publishes_an_adapter_and_a_worker_puts_it_on_its_own_base(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from thinwire.integrations.adapters import adapter_parameters, with_adapter
    from thinwire.integrations.transformers_publishing import PublishCallback

    store = fresh()
    run = grpo(tmp_path, [PublishCallback(store, dtype=None)], peft_config=adapter_config())
    run.train()
    run.model.save_pretrained(tmp_path / "saved")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    consumer = thinwire.Consumer(store)
    state = consumer.fetch()
    assert set(state.layouts) == set(saved)
    assert consumer._remote.chain.manifests[3].metadata["thinwire.adapter"] == "alone"
    served = with_adapter(llama(), consumer._remote.chain.manifests[3].metadata)
    tensors = adapter_parameters(served)
    consumer.load(tensors)
    for name, tensor in saved.items():
        assert torch.equal(tensors[name], tensor)
    tokens = torch.arange(2, 10)[None]
    served.eval(), run.model.eval()
    with torch.no_grad():
        assert torch.equal(served(tokens).logits, run.model(tokens).logits)


@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_adapter_is_what_peft_merges_and_the_base_comes_back_bit_for_bit(dora: bool) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], use_dora=dora, init_lora_weights=False, modules_to_save=["norm"]
    )
    model = peft.get_peft_model(llama().bfloat16(), config)  # in bf16 unmerging by subtraction would be inexact
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    store = fresh()
    publishing = Publishing(store, adapters="merged")
    publishing.publish(model, 0)
    publishing.flush()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(getattr(module, "merged", False) for module in model.modules())
    assert same(loaded(store, expected), expected)
    model.merge_adapter()
    with pytest.raises(MisuseError, match="merged already"):
        publishing.publish(model, 1)


def test_what_cannot_be_merged_is_refused() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = peft.get_peft_model(llama(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(MisuseError, match="publish it alone"), state_to_publish(model, adapters="merged"):
        pass
    with state_to_publish(model) as state:
        assert set(state.tensors) == {"prompt_embeddings"}
    with pytest.raises(MisuseError, match="adapters"):
        Publishing(fresh(), adapters="both")  # type: ignore[arg-type]
    with pytest.raises(MisuseError, match="every"):
        Publishing(fresh(), every=0)


class Switched:
    """A store that can be switched off."""

    def __init__(self, inner: MemoryStore) -> None:
        self.inner, self.down = inner, False

    def __getattr__(self, name: str) -> Any:
        if self.down:
            raise StoreUnavailableError("switched off")
        return getattr(self.inner, name)


def test_a_store_that_fails_does_not_end_the_training_and_nothing_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    inner = MemoryStore()
    failing: Any = Switched(inner)
    model = tiny()
    publishing = Publishing(failing, dtype=None, retry_s=0.0)
    publishing.publish(model, 0)
    publishing.flush()
    failing.down = True
    for step in (1, 2, 3):
        with torch.no_grad():
            model[0].weight.mul_(1.01)  # type: ignore[union-attr, operator]
        publishing.step(model, step)
    with pytest.raises(RetryError):
        publishing.flush()
    assert "training goes on" in caplog.text
    failing.down = False
    assert publishing.flush().step == 1  # type: ignore[union-attr]
    publishing.step(model, 4)
    publishing.flush()
    assert same16(loaded(inner, model.state_dict()), model.state_dict())
    assert publishing.report is not None
    assert publishing.report.step == 4


def same16(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def test_two_trainers_in_one_store_do_not_both_win() -> None:
    store = MemoryStore()
    one, two = (Publishing(store, wait=True) for _ in range(2))
    model = tiny()
    one.publish(model, 0)
    two.publish(model, 0)
    with pytest.raises(ConflictError):
        one.publish(model, 1)


def test_reports_are_told_in_order_each_once() -> None:
    seen: list[Any] = []
    publishing = Publishing(MemoryStore(), on_report=seen.append)
    model = tiny()
    for step in range(4):
        publishing.step(model, step)
        publishing.step(model, step)  # its turn has been
    publishing.flush()
    publishing.flush()
    assert [report.step for report in seen] == [0, 1, 2, 3]
    assert log_values(seen[-1])["publish/version"] == 4


def test_an_accelerate_loop_publishes_after_each_step_of_its_optimiser() -> None:
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    inner = tiny()
    model, optimizer = accelerator.prepare(inner, torch.optim.AdamW(inner.parameters(), lr=1e-2))
    store = fresh()
    publishing = Publishing(store)
    publishing.publish(model, 0)
    handle = publishing.after(optimizer, model)
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(model(torch.ones(4, 8)).sum())
        optimizer.step()
    handle.remove()
    optimizer.step()
    assert publishing.flush().step == 3  # type: ignore[union-attr]
    assert thinwire.Consumer(store).fetch().version == 4


@pytest.mark.slow  # it imports the compiler
def test_wrappers_leave_no_trace_in_the_names() -> None:
    model = tiny()
    names = set(model.state_dict())
    compiled = torch.compile(model)
    assert unwrapped(compiled) is model  # type: ignore[arg-type]
    inner = nn.Sequential(torch.compile(model[0]), *list(model)[1:])  # type: ignore[arg-type, index, call-overload]
    assert set(gathered_state(inner)) == names
    zero3 = tiny()
    zero3[0].weight.ds_id = 7  # type: ignore[union-attr, assignment]
    with pytest.raises(MisuseError, match="ZeRO-3"):
        gathered_state(zero3)


def test_lightning_publishes_a_module_of_its_module(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
    from thinwire.integrations.lightning_publishing import PublishCallback

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            if self.global_step == 4:
                raise RuntimeError("the machine burns")
            found: torch.Tensor = self.net(batch[0]).square().mean()
            return found

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def fit(module: Any, callback: Any, steps: int) -> Any:
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 8)), batch_size=4)
        runner = lightning.Trainer(
            accelerator="cpu", max_steps=steps, callbacks=[callback], default_root_dir=tmp_path, logger=False,
            enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
            enable_checkpointing=False,
        )  # fmt: skip
        runner.fit(module, data)
        return runner

    store, module = fresh(), Module()
    runner = fit(module, PublishCallback(store, every=2, module="net", wait=True), 3)
    consumer = thinwire.Consumer(store)
    model = as_served(module.net)
    assert [consumer.load(copy.deepcopy(model), version=v).step for v in (1, 2, 3)] == [0, 2, 3]
    assert same(loaded(store, model), model)
    assert runner.callback_metrics["publish/version"] >= 1
    burning, other = Module(), fresh()
    with pytest.raises(RuntimeError, match="burns"):
        fit(burning, PublishCallback(other, module="net"), 9)
    assert same(loaded(other, model), as_served(burning.net))  # the last step before it
    with pytest.raises(MisuseError, match="policy"):
        fit(Module(), PublishCallback(fresh(), module="policy"), 1)
