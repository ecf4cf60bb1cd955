"""The program as a whole: help, start-up, exit codes, and no traceback for what is not a bug."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import click
import pytest
import typer
from rich.console import Console

from tests.cli.tools import command, environment, program, series, thinwire
from tests.sync.checkpoints import load, same, save, save_sharded
from thinwire import Publisher, __version__
from thinwire.cli import app
from thinwire.cli.group import Commands
from thinwire.cli.output import Bars, age_text, bytes_text, share_text, watched
from thinwire.errors import ConflictError
from thinwire.stores.memory import MemoryStore

NAMES = ["diff", "apply", "inspect", "publish", "pull", "follow", "log", "report", "verify", "gc"]


@pytest.mark.parametrize("name", NAMES)
def test_help_has_examples_that_parse_and_fits_in_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = thinwire(name, "--help").out
    assert max(map(len, text.splitlines())) <= 80
    examples = [line.split() for line in text.partition("Examples")[2].splitlines() if line.strip()]
    assert len(examples) >= 2
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    for words in examples:
        assert words[:2] == ["thinwire", name]
        found = group.get_command(click.Context(group), name)
        assert found is not None
        found.make_context(name, words[2:])  # raises for an option that is not there
        for argument in (p for p in found.params if isinstance(p, click.Argument)):
            assert getattr(argument, "help", None)


def test_the_group_names_all_commands_and_imports_none_of_the_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = thinwire("--help").out
    assert all(f" {name} " in text for name in NAMES)
    assert "Exit codes" in text
    assert thinwire("--version").out == f"thinwire {__version__}\n"
    thinwire("nonsense", code=2)
    heavy = ["torch", "numba", "thinwire.bench.cli", "thinwire.lab.demo.command", "obstore", "fsspec"]
    script = "\n".join(
        [
            "import sys",
            "from thinwire.cli import app",
            "for args in (['--help'], ['log', '--help'], ['log', 'nowhere'], ['inspect', 'nowhere']):",
            "    try: app(args)",
            "    except SystemExit: pass",
            f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_each_kind_of_failure_has_its_exit_code_and_none_a_traceback(tmp_path: Path) -> None:
    (old, new, other), _ = series(tmp_path, 3)
    thinwire("diff", old, new, "-o", "patch")
    Path("bad").write_bytes(Path("patch").read_bytes()[:100])
    Path("empty/manifests").mkdir(parents=True)
    thinwire("publish", "damaged", old)
    next(Path("damaged").glob("objects/*/model*")).write_bytes(b"")
    for args, code in (
        (("apply", old, "patch", "-o", "out"), 0),
        (("apply", old, "patch"), 2),
        (("apply", old, "bad", "-o", "out"), 3),
        (("apply", other, "patch", "-o", "out"), 4),
        (("verify", "damaged"), 5),
        (("pull", "empty", "-o", "d"), 6),
    ):
        result = program(*args)
        assert (result.code, "Traceback" in result.err) == (code, False), (args, result)
    assert Path("out").read_bytes() == new.read_bytes()


def test_the_console_script_is_this_command() -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="thinwire")
    assert script.value == "thinwire.cli:main"
    assert program("--version").out == f"thinwire {__version__}\n"


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    (old,), _ = series(tmp_path, 1)
    line = " ".join(f"'{word}'" for word in command("inspect", old, "--json"))
    done = subprocess.run(f"{line} | true", shell=True, capture_output=True, text=True, env=environment(), timeout=60)
    assert "Traceback" not in done.stderr


# --- mounting ------------------------------------------------------------------------------------------------------


def test_commands_are_mounted_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    inner = typer.Typer()

    @inner.command()
    def one(word: str, times: int = 1) -> None:
        calls.append([word] * times)

    @inner.command()
    def two() -> None:
        raise ConflictError("taken")

    module = types.ModuleType("mounted_for_a_test")
    module.app, module.main = inner, lambda args: calls.append(args) or 7  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "mounted_for_a_test", module)

    class Group(Commands):
        mounts = {  # noqa: RUF012
            "typer": ("mounted_for_a_test", "app", "An app."),
            "plain": ("mounted_for_a_test", "main", "A function."),
            "absent": ("thinwire.no.such.module", "main", "Not there."),
        }

    outer = typer.Typer(cls=Group)
    outer.callback()(lambda: None)
    from typer.testing import CliRunner

    run = CliRunner().invoke
    text = run(outer, ["--help"]).output
    assert "An app." in text
    assert "absent" not in text
    assert run(outer, ["typer", "one", "hi", "--times", "2"]).exit_code == 0
    assert run(outer, ["plain", "--json", "x", "--help"]).exit_code == 7
    assert calls == [["hi", "hi"], ["--json", "x", "--help"]]
    failed = run(outer, ["typer", "two"])
    assert (failed.exit_code, failed.stderr) == (3, "error: taken\n")
    assert run(outer, ["absent"]).exit_code == 2


# --- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_999, "1 MB"),
        (16e9, "16 GB"),
        (5e15, "5e+03 TB"),
    ],
)
def test_sizes(size: float, text: str) -> None:
    assert bytes_text(size) == text


def test_shares_and_ages() -> None:
    assert [share_text(0, 5), share_text(5, 0), share_text(1, 8)] == ["0 %", "0 %", "12.5 %"]
    assert [age_text(s) for s in (-3, 119, 121, 7201, 172801)] == ["0 s", "119 s", "2 min", "2 h", "2 d"]


def test_bars_are_for_terminals_and_for_work_that_lasts() -> None:
    def show(terminal: bool, after_s: float) -> str:
        stream = io.StringIO()
        with Bars(Console(file=stream, force_terminal=terminal, width=80), after_s=after_s) as bars:
            bars("diff", 0, 100)
            bars._timer.join() if terminal and after_s == 0 else None
            bars("diff", 30, 100)
            bars("fetch", 5_000_000, 0)
            if bars._started:
                bars._progress.refresh()
        return stream.getvalue()

    shown = show(True, 0)
    assert "diff" in shown
    assert "30/100 bytes" in shown
    assert "5.0" in shown
    assert show(False, 0) == show(True, 100) == ""


def test_traffic_is_counted_and_everything_else_passes_through() -> None:
    seen: list[tuple[str, int, int]] = []
    inner = MemoryStore()
    store = watched(inner, lambda *x: seen.append(x))  # type: ignore[arg-type]
    store.put("a/b", [b"12345", bytearray(3)])
    assert store.get("a/b", size_max=8) == b"12345\0\0\0"
    store.create("c", [b"x"])
    assert [info.key for info in store.list("")] == ["a/b", "c"]
    assert (store.head("c").size, store.url) == (1, inner.url)
    assert seen == [("upload", 0, 0), ("upload", 8, 0), ("fetch", 0, 0), ("fetch", 8, 0)]


def test_json_stays_alone_on_stdout(tmp_path: Path) -> None:
    (old, new), _ = series(tmp_path, 2)
    result = program("diff", old, new, "-o", "p", "--json")
    assert (json.loads(result.out)["patch"], result.err) == ("p", "")
    result = thinwire("diff", old, "nowhere", "-o", "p", "--json", code=2)
    assert result.json["error"]["exit_code"] == 2
    assert result.err.startswith("error: ")


def test_the_commands_of_the_documentation(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    lines = [x for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for x in block.splitlines()]
    store, (_, states) = tmp_path / "run", series(tmp_path, 2)
    publisher = Publisher(str(store))
    for k in range(12):
        publisher.publish(states[k % 2])
    for k in range(2):
        save(tmp_path / f"step-{100 + k}.safetensors", states[k])
        save_sharded(tmp_path / ("base", "tuned")[k], states[k])
    (tmp_path / "reload.sh").write_text("#!/bin/sh\necho $THINWIRE_VERSION > seen\n")
    (tmp_path / "reload.sh").chmod(0o755)
    for line in lines:
        words = shlex.split(line.replace("/shared/run", str(store)))
        thinwire(*words[1:], *(["--once"] if words[1] == "follow" else []))
    assert {line.split()[1] for line in lines} == set(NAMES)
    assert (tmp_path / "seen").read_text() == "13\n"
    assert same(load(tmp_path / "tuned-here"), states[1])
    assert same(load(tmp_path / "model-12"), states[1])
