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
from thinwire.lab.vision.config import VisionConfig

ROOT = Path(__file__).resolve().parents[2]
FEW = ["--epochs", "1", "--train-limit", "128", "--test-limit", "32", "--width", "4", "--batch-size", "32"]


def vision() -> click.Command:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    found = group.get_command(click.Context(group), "vision")
    assert found is not None
    return found


def test_every_option_of_the_config_is_one_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = thinwire("train", "vision", "--help").out
    assert max(map(len, text.splitlines())) <= 80
    names = {param.name for param in vision().params}
    assert names == {"config", "print_config", "as_json", *(option.name for option in options_of(VisionConfig))}
    for option in options_of(VisionConfig):
        assert f"--{option.name.replace('_', '-')}"[:20] in text
    examples = [line.split() for line in text.partition("Examples")[2].splitlines() if line.strip()]
    assert len(examples) >= 3
    for words in examples:
        assert words[:3] == ["thinwire", "train", "vision"]
        vision().make_context("vision", words[3:])  # raises for an option that is not there


def test_help_and_print_config_answer_without_torch() -> None:
    code = (
        "import sys\nfrom thinwire.cli import app\n"
        "for args in (['train', '--help'], ['train', 'vision', '-h'], ['train', 'vision', '--print-config'],"
        " ['train', 'vision', '--lr', '-1']):\n"
        "    try: app(args)\n    except SystemExit: pass\n"
        "print([name for name in ('torch', 'numba', 'yaml') if name in sys.modules], file=sys.stderr)"
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


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
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


def test_workers_are_started_and_one_of_them_speaks(tmp_path: Path) -> None:
    words = ["train", "vision", *FEW, "--workers", "2", "--compress", "topk", "--density", "0.1", "--mode", "split"]
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
