"""``thinwire train``: every option of the config is one of the command, and torchrun or --workers makes it many."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
import yaml

from tests.cli.tools import command, environment, thinwire
from thinwire.cli.training import app
from thinwire.lab.config import from_yaml, options_of, to_mapping
from thinwire.lab.text.config import LmConfig
from thinwire.lab.vision.config import VisionConfig

ROOT = Path(__file__).resolve().parents[2]
FEW = ["--epochs", "1", "--train-limit", "128", "--test-limit", "32", "--width", "4", "--batch-size", "32"]


def recipe(name: str) -> click.Command:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    found = group.get_command(click.Context(group), name)
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "config"), [("vision", VisionConfig), ("lm", LmConfig)])
def test_every_option_of_the_config_is_one_of_the_command(
    monkeypatch: pytest.MonkeyPatch, name: str, config: type
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = thinwire("train", name, "--help").out
    assert max(map(len, text.splitlines())) <= 80
    names = {param.name for param in recipe(name).params}
    assert names == {"config", "print_config", "as_json", *(option.name for option in options_of(config))}
    for option in options_of(config):
        assert f"--{option.name.replace('_', '-')}"[:20] in text
    examples = [line.split() for line in text.partition("Examples")[2].splitlines() if line.strip()]
    assert len(examples) >= 3
    for words in examples:
        assert words[:3] == ["thinwire", "train", name]
        recipe(name).make_context(name, words[3:])  # raises for an option that is not there


def test_help_and_print_config_answer_without_torch() -> None:
    code = (
        "import sys\nfrom thinwire.cli import app\n"
        "for args in (['train', '--help'], ['train', 'vision', '-h'], ['train', 'vision', '--print-config'],"
        " ['train', 'lm', '-h'], ['train', 'lm', '--print-config'],"
        " ['train', 'vision', '--lr', '-1']):\n"
        "    try: app(args)\n    except SystemExit: pass\n"
        "print([name for name in ('torch', 'numba', 'yaml', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_what_is_printed_can_be_fed_back() -> None:
    options = ["--model", "resnet50", "--lr", "0.25", "--no-error-feedback", "--out", "a: b", "--compress", "powersgd"]
    printed = thinwire("train", "vision", *options, "--print-config").out
    Path("c.yaml").write_text(printed)
    assert thinwire("train", "vision", "--config", "c.yaml", "--print-config").out == printed
    over = thinwire("train", "vision", "--config", "c.yaml", "--error-feedback", "--lr", "1", "--print-config").out
    config = VisionConfig(model="resnet50", lr=1.0, out="a: b", compress="powersgd")
    assert yaml.safe_load(over) == to_mapping(config)


def test_wrong_options_end_with_2_and_the_nearest_name() -> None:
    Path("c.yaml").write_text("densty: 0.1\n")
    result = thinwire("train", "vision", "--config", "c.yaml", "--json", code=2)
    assert result.json["error"]["message"] == "c.yaml: there is no option densty; did you mean density?"
    assert thinwire("train", "vision", "--config", "nowhere.yaml", code=2).err.startswith("error: ")
    assert "above 0" in thinwire("train", "vision", "--density", "0", code=2).err
    assert "give out" in thinwire("train", "vision", "--resume", "auto", code=2).err
    Path("c.yaml").write_text("[")
    assert "no YAML" in thinwire("train", "vision", "--config", "c.yaml", code=3).err


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", [x for x in CONFIGS if x.name.startswith("lm")], ids=lambda path: path.name)
def test_the_configs_of_language_models_are_read(path: Path) -> None:
    config = from_yaml(LmConfig, path, {})
    assert (config.data, config.shape.width) == ("tinyshakespeare", 224)
    assert f"out/{path.stem}" == config.out
    assert (config.corruption == "none") == ("corrupted" not in path.name)


@pytest.mark.parametrize(
    "path", [x for x in CONFIGS if not x.name.startswith(("lm", "sparserl", "study"))], ids=lambda path: path.name
)
def test_the_configs_that_come_with_it_are_read(path: Path) -> None:
    config = from_yaml(VisionConfig, path, {})
    assert (config.data, config.model, config.workers) == ("cifar10", "resnet18", 4)
    assert (config.compress == "none") == (path.name == "dense.yaml")


def test_the_two_configs_differ_in_compression_only() -> None:
    dense, compressed = (to_mapping(from_yaml(VisionConfig, ROOT / "configs" / f"{name}.yaml", {}))
                         for name in ("dense", "compressed"))  # fmt: skip
    assert {name for name in dense if dense[name] != compressed[name]} == {
        "compress", "values", "mode", "momentum", "feedback_momentum", "density_warmup_steps", "out",
    }  # fmt: skip


def test_one_process_prints_a_summary_for_people_and_for_programs() -> None:
    said = thinwire("train", "vision", *FEW, "--compress", "topk")
    assert re.search(r"accuracy +[0-9.]+ % \(best", said.out)
    assert "epoch 1/1" in said.err
    assert "--compress has no effect" in said.err
    document = thinwire("train", "vision", *FEW, "--json").json
    assert (document["steps"], document["workers"], document["config"]["width"]) == (4, 1, 4)
    assert document["accuracy"] == document["history"][-1]["accuracy"]
    assert document["digest"] in said.out


def test_a_language_model_is_trained_and_writes(tmp_path: Path) -> None:
    few = ["--train-limit", "2000", "--valid-limit", "500", "--layers", "1", "--width", "16", "--heads", "1",
           "--context", "16", "--steps", "4"]  # fmt: skip
    said = thinwire("train", "lm", *few, "--shards", "clean_vs_corrupt", "--corruption", "token_swap")
    assert re.search(r"validation +loss [0-9.]+ nats a token, perplexity [0-9.]+", said.out)
    assert re.search(r"corrupted +workers 0: token_swap", said.out)
    assert "step 4/4  validation loss" in said.err
    document = thinwire("train", "lm", *few, "--sample", "50", "--json").json
    assert (document["steps"], document["vocabulary"], len(document["sample"])) == (4, 28, 50)
    assert document["loss"] == document["history"][-1]["valid_loss"]
    assert "for shards clean_vs_corrupt" in thinwire("train", "lm", "--corruption", "stale", code=2).err
    Path("notes.txt").write_bytes(b"\0" * 100)
    assert "zero bytes" in thinwire("train", "lm", "--data", "notes.txt", code=3).err


def test_workers_are_started_and_one_of_them_speaks(tmp_path: Path) -> None:
    words = ["train", "vision", *FEW, "--workers", "2", "--compress", "topk", "--density", "0.1", "--mode", "split"]
    words += ["--log", "jsonl", "--signal", "loss_ema"]  # of which torchrun has longer ones
    line = command(*words, "--no-nesterov", "--out", tmp_path / "run", "--json")
    env = {**environment(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout)
    assert (document["workers"], document["steps"], document["finished"]) == (2, 2, True)
    assert 0 < document["bytes_received"] < 0.4 * document["bytes_dense"]
    assert done.stderr.count("epoch 1/1") == 1
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_the_commands_of_the_documentation() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    lines = [x for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for x in block.splitlines()]
    lines = [x.partition(" #")[0] for x in lines if "thinwire train" in x]
    assert len(lines) >= 5
    os.symlink(ROOT / "configs", "configs")
    for line in lines:
        words = shlex.split(line.partition("thinwire train ")[2])
        thinwire("train", *words, "--print-config")  # the options are there, and fit each other
