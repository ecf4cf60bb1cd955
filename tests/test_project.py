"""The house rules that can be checked: layers, the public surface, inert imports, examples that run."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import thinwire

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "thinwire"


def test_imports_go_down_only() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--config", str(ROOT / "pyproject.toml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_the_public_surface_is_what_it_was() -> None:
    assert thinwire.__all__ == [
        "ApplyResult", "Consumer", "PublishReport", "Publisher", "ShardedConsumer", "ShardedPublisher", "SparseSync",
        "SparseSyncMod", "SparseTaskRouter", "SparsityTracker", "ThinwireError", "Version", "__version__", "merge",
        "open_store", "optim",
    ]  # fmt: skip
    for name in thinwire.__all__:
        assert getattr(thinwire, name) is not None
    assert thinwire.merge.Continual.__name__ == "Continual"
    for owner in (thinwire, thinwire.merge):
        with pytest.raises(AttributeError):
            owner.nothing  # noqa: B018


def test_importing_is_inert() -> None:
    code = (
        "import sys, logging, os; before = dict(os.environ); import thinwire; "
        "heavy = {'torch', 'numba', 'numpy', 'obstore', 'fsspec', 'rich', 'typer'} & set(sys.modules); "
        "assert not heavy, heavy; assert dict(os.environ) == before; assert not logging.getLogger().handlers"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


OPTIONAL = {
    "PIL": {"lab"},
    "cryptography": {"crypto.py"},
    "curvlinops": {"probe"},
    "datasets": {"lab"},
    "flwr": {"bench", "integrations"},
    "fsspec": {"stores"},
    "gguf": {"lab"},
    "libtorrent": {"peers"},
    "lightning": {"integrations"},
    "matplotlib": {"bench", "lab", "merge", "probe"},
    "mergekit": {"bench"},
    "mooncake": {"peers"},
    "nixl": {"peers"},
    "nixl_cu12": {"peers"},
    "opentelemetry": {"integrations"},
    "pcodec": {"bench"},
    "peft": {"integrations", "lab"},
    "plotly": {"bench", "cli", "lab"},
    "prometheus_client": {"integrations"},
    "pyarrow": {"lab", "probe"},
    "reasoning_gym": {"lab"},
    "sklearn": {"lab"},
    "tokenizers": {"lab"},
    "transformers": {"integrations", "lab"},
    "triton": {"tensors", "optim"},
    "vllm": {"integrations"},
    "wandb": {"lab"},
    "yaml": {"lab"},
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_an_optional_dependency_stays_in_its_layer(name: str) -> None:
    files = [p for p in SOURCE.rglob("*.py") if re.search(rf"^\s*(import|from) {name}\b", p.read_text(), re.MULTILINE)]
    assert {path.relative_to(SOURCE).parts[0] for path in files} <= OPTIONAL[name]


def modules() -> list[str]:
    skipped = ("thinwire.__main__", "thinwire.bench.__main__", "thinwire.lab.demo.__main__")
    names = [m.name for m in pkgutil.walk_packages([str(SOURCE)], "thinwire.")]
    return ["thinwire", *(name for name in names if name not in skipped)]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_in_the_docs_runs(path: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    if not blocks:
        return
    script = tmp_path / "docs.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{path}:\n{done.stderr}"


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_docs_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RENTED = [path for path in EXAMPLES if path.name.startswith("modal_")]  # they need an account, and cost money


@pytest.mark.parametrize("path", RENTED, ids=lambda p: p.name)
def test_examples_on_rented_machines_use_options_that_there_are(path: Path) -> None:
    text = path.read_text()
    compile(text, str(path), "exec")
    helps = ""
    for command in ("train lm", "bench signal"):
        assert all(f'"{word}"' in text for word in command.split())
        words = [sys.executable, "-m", "thinwire", *command.split(), "--help"]
        helps += subprocess.run(
            words, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "200"}
        ).stdout
    used = set(re.findall(r'"(--[a-z-]+)"', text))
    assert used
    assert all(option in helps for option in used), used


LONG = {"signal_weighted.py", "compressed_ddp.py", "local_steps.py"}  # several processes that train


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.name, marks=[pytest.mark.slow] if path.name in LONG else [])
        for path in EXAMPLES
        if path not in RENTED
    ],
)
def test_examples_run(path: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example shows something"


def test_no_file_is_too_long_to_hold_in_the_head() -> None:
    long = {str(p.relative_to(ROOT)): n for p in SOURCE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 480}
    assert not long
