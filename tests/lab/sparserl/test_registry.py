"""Methods and tasks are found by name or by file, and told apart from what is neither."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from thinwire.errors import MisuseError
from thinwire.lab.sparserl.registry import find, names

METHODS = [
    "aspg", "dense", "dora", "frozen-subnetwork", "lora", "momentum-guided", "prefix-tuning", "prompt-tuning",
    "random-mask", "shira",
]  # fmt: skip
TASKS = [
    "chain-sum", "count-bits", "gcd", "gsm8k", "hh-harmless", "hh-helpful", "humaneval", "sort-digits",
    "spell-backward", "toxigen", "truthfulqa",
]  # fmt: skip


def test_every_file_is_a_method_or_a_task_of_its_name() -> None:
    assert names("method") == METHODS
    assert names("task") == TASKS
    for name in METHODS:
        method = find("method", name)
        assert method.about
        assert len(method.lrs) == 4, "tuning costs every method the same"
    for name in TASKS:
        assert find("task", name).about


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [("method", "apsg", "aspg"), ("method", "random_mask", "random-mask"), ("task", "gsm8", "gsm8k"),
     ("task", "../../etc", "there are"), ("method", "", "there are")],
)  # fmt: skip
def test_an_unknown_name_is_told_near_ones(kind: str, name: str, hint: str) -> None:
    with pytest.raises(MisuseError, match=hint):
        find(kind, name)  # type: ignore[arg-type]


def test_a_method_of_ones_own_is_one_file(tmp_path: Path) -> None:
    file = tmp_path / "half.py"
    file.write_text(
        "from thinwire.lab.sparserl.masked import masked\nfrom thinwire.lab.sparserl.methods.base import Method\n"
        "METHOD = Method(about='half', prepare=lambda model, setting: masked(model, setting, 0.5), lrs=(1e-3,))\n"
    )
    assert find("method", str(file)).about == "half"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("x = 1", "defines no METHOD"), ("METHOD = 3", "defines no METHOD"), ("1/0", "ZeroDivisionError"),
     ("def", "SyntaxError")],
)  # fmt: skip
def test_a_file_that_is_no_method_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(MisuseError, match=complaint):
        find("method", str(file))
    with pytest.raises(MisuseError, match="no file"):
        find("method", str(tmp_path / "nowhere.py"))


def test_names_are_listed_without_torch() -> None:
    code = (
        "import sys; from thinwire.lab.sparserl.registry import names; assert names('method');"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
