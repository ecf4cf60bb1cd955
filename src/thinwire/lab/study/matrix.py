"""Which runs a study makes: a centre, and blocks that vary it.

A configuration (``configs/study.yaml``) names one run, the *centre*, and a list of blocks; a block is a full cross of
its lists, and what it does not name is as in the centre. Runs that several blocks name are made once.

>>> study = study_of({"centre": {"steps": 4}, "seeds": [0, 1], "vary": [{"objective": ["rl", "sft"]}, {"seed": [7]}]})
>>> [(run.objective, run.seed) for run in study.runs]
[('rl', 0), ('rl', 1), ('sft', 0), ('sft', 1), ('rl', 7)]
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from thinwire.errors import MisuseError
from thinwire.lab.yaml_files import read_mapping

__all__ = ["CHOICES", "LEVELS", "Run", "Study", "read_study", "study_of"]

LEVELS = ("low", "mid", "high")
CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("rl", "sft", "pretrain"),
    "optimiser": ("adam", "adamw", "sgd", "adafactor"),
    "lr": LEVELS,
    "reward": ("exact", "partial", "noisy"),
    "weights": ("masters", "bf16", "fp32"),
    "control": ("none", "random", "shuffled"),
    "enforce": ("none", "random", "gradient"),
}
_RUNS_MAX = 20_000
_REPEAT = 1_000_003
_LATER = {"repeat": 0, "start": ""}
"""Axes that came later, and the values at which a run is called what it was called without them."""


@dataclass(frozen=True, slots=True)
class Run:
    """One training run.

    objective: ``rl`` (GRPO), ``sft`` (right answers, from the same start) or ``pretrain`` (whole texts, from random
    weights). lr: a level; what it is in numbers is the study's, by optimiser. weights: fp32 ``masters`` served as bf16,
    ``bf16`` updated in place, or ``fp32``. control: the gradients as they are, replaced by ``random`` ones of the same
    norms, or with advantages ``shuffled`` between answers (RL only). enforce: train only a share ``density`` of the
    weights, chosen at ``random`` or by the first ``gradient``. repeat: another run from the same weights, whose
    problems, answers and noise are drawn anew. start: begin from what was warm-started on this task instead of its own.
    """

    objective: str = "rl"
    optimiser: str = "adamw"
    lr: str = "mid"
    size: str = "mid"
    task: str = "chain_sum"
    reward: str = "exact"
    weights: str = "masters"
    control: str = "none"
    enforce: str = "none"
    density: float = 1.0
    steps: int = 64
    seed: int = 0
    repeat: int = 0
    start: str = ""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                near = difflib.get_close_matches(str(value), choices, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(choices)}"
                raise MisuseError(f"there is no {name} {str(value)[:40]!r}; {hint}")
        for name, least in (("steps", 1), ("seed", 0), ("repeat", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise MisuseError(f"{name} is {str(value)[:40]!r}; give a whole number from {least}")
        if not isinstance(self.density, int | float) or not 0 < self.density <= 1:
            raise MisuseError(f"density is {str(self.density)[:40]!r}; give a share above 0, up to 1")
        if self.control == "shuffled" and self.objective != "rl":
            raise MisuseError("shuffled advantages need the objective rl")
        if self.start and self.objective == "pretrain":
            raise MisuseError("pre-training starts from random weights; leave start out")
        if (self.enforce == "none") != (self.density == 1):
            raise MisuseError("enforce (random or gradient) and a density below 1 go together")

    @property
    def condition(self) -> tuple[Any, ...]:
        """Everything but the seed: runs of one condition are repetitions."""
        return tuple(getattr(self, f.name) for f in fields(self) if f.name != "seed")

    @property
    def draw(self) -> int:
        """The seed of its problems, answers and noise; ``seed`` alone is that of the weights it starts from."""
        return self.seed + _REPEAT * self.repeat


@dataclass(frozen=True, slots=True)
class Study:
    """Runs, and what their words mean: sizes (arguments of a model), tasks (a generator and its settings), learning
    rates by optimiser and level. Of runs in ``curved`` the objective's curvature is measured too."""

    runs: tuple[Run, ...]
    centre: Run
    sizes: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, Mapping[str, Any]]
    lrs: Mapping[str, Sequence[float]]
    about: Mapping[str, Any] = field(default_factory=dict)
    curved: frozenset[Run] = frozenset()

    def lr(self, run: Run) -> float:
        """The learning rate of ``run``."""
        return self.lrs[run.optimiser][LEVELS.index(run.lr)]

    def id(self, run: Run) -> str:
        """A name for ``run`` that says all that its result depends on: 16 hex digits."""
        axes = {name: value for name, value in asdict(run).items() if value != _LATER.get(name, ...)}
        facts = [axes, self.lr(run), dict(self.sizes[run.size]), dict(self.tasks[run.task])]
        return hashlib.blake2s(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


_SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden": 64, "layers": 2},
    "mid": {"hidden": 128, "layers": 3},
    "large": {"hidden": 192, "layers": 4},
}
_TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "spell_backward": {"min_word_len": 3, "max_word_len": 5},
    "sort_digits": {"length": 4},
}
_LRS: dict[str, list[float]] = {
    "adam": [1e-6, 1e-5, 1e-4],
    "adamw": [1e-6, 1e-5, 1e-4],
    "sgd": [1e-3, 1e-2, 1e-1],
    "adafactor": [1e-6, 1e-5, 1e-4],
}
_KEYS = ("about", "centre", "seeds", "sizes", "tasks", "lrs", "vary", "curvature")


def _named(values: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise MisuseError(f"there is no {what} {str(key)[:40]!r}; {hint}")


def _mapping(values: Any, what: str) -> dict[str, Any]:
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise MisuseError(f"{what} is no mapping; write 'name: value' a line")
    return dict(values)


def study_of(values: Mapping[str, Any]) -> Study:
    """A study from the mapping of its configuration.

    Raises:
        MisuseError: an unknown key or value (the nearest is named), or more than 20,000 runs.
    """
    _named(values, _KEYS, "key")
    axes = [f.name for f in fields(Run)]
    centre_values = _mapping(values.get("centre", {}), "centre")
    _named(centre_values, axes, "axis")
    centre = Run(**centre_values)
    seeds = values.get("seeds", [0])
    blocks = values.get("vary", [{}])
    if not isinstance(seeds, list) or not seeds:
        raise MisuseError("seeds is a list of one entry at least")
    runs = _crossed(blocks, "vary", centre, seeds)
    curved = _crossed(values.get("curvature", []), "curvature", centre, seeds)
    sizes = _SIZES | _mapping(values.get("sizes", {}), "sizes")
    tasks = _TASKS | _mapping(values.get("tasks", {}), "tasks")
    lrs = _LRS | _mapping(values.get("lrs", {}), "lrs")
    _named(lrs, list(_LRS), "optimiser")
    for name, levels in lrs.items():
        if not isinstance(levels, list) or len(levels) != len(LEVELS) or not all(_is_lr(lr) for lr in levels):
            raise MisuseError(f"lrs of {name} are {str(levels)[:60]}; give three numbers: low, mid, high")
    for run in runs:
        for kind, known, value in (
            ("size", sizes, run.size), ("task", tasks, run.task), ("task", tasks, run.start or run.task),
        ):  # fmt: skip
            _named({value: None}, list(known), kind)
    about = _mapping(values.get("about", {}), "about")
    return Study(tuple(runs), centre, sizes, tasks, lrs, about, frozenset(curved) & frozenset(runs))


def _crossed(blocks: Any, key: str, centre: Run, seeds: list[Any]) -> dict[Run, None]:
    """The runs of a list of blocks, in order."""
    if not isinstance(blocks, list):
        raise MisuseError(f"{key} is a list of blocks")
    runs: dict[Run, None] = {}
    for block in blocks:
        lists = _mapping(block, f"a block of {key}")
        _named(lists, [f.name for f in fields(Run)], "axis")
        lists.setdefault("seed", seeds)
        choices = [value if isinstance(value, list) else [value] for value in lists.values()]
        if any(not choice for choice in choices) or len(runs) + _product(choices) > _RUNS_MAX:
            raise MisuseError(f"a block of {key} has an empty list, or there are more than {_RUNS_MAX} runs")
        for chosen in itertools.product(*choices):
            runs[replace(centre, **dict(zip(lists, chosen, strict=True)))] = None
    return runs


def _is_lr(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6


def _product(choices: Sequence[Sequence[Any]]) -> int:
    count = 1
    for choice in choices:
        count *= len(choice)
    return count


def read_study(path: Path) -> Study:
    """A study from a YAML file.

    Raises:
        MisuseError, MalformedError: as :func:`study_of` and :func:`thinwire.lab.yaml_files.read_mapping`.
    """
    return study_of(read_mapping(path, extra="study"))
