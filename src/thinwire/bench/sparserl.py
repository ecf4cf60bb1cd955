"""SparseRL: which cells a suite has, and carrying them out so that a suite that was killed goes on.

In the folder: ``starts`` (models before a run), ``tuning`` and ``results`` (a JSON file a run, whole or not at all),
``failed`` (runs that raised; they are tried again the next time).
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from thinwire.bench.measure import extra_memory
from thinwire.bench.sparserl_results import SCHEMA, Result, read_result, result_of
from thinwire.errors import MalformedError, MisuseError
from thinwire.lab.pool import Pool, workers
from thinwire.lab.sparserl.registry import find
from thinwire.lab.sparserl.starts import make_start
from thinwire.lab.sparserl.train import Cell, train
from thinwire.lab.yaml_files import read_mapping
from thinwire.sync.files import staged_file

__all__ = ["Suite", "cell_id", "choose_lrs", "read_suite", "run_suite", "suite_of"]

_KEYS = (
    "title",
    "algorithm",
    "steps",
    "prompts",
    "group",
    "problems",
    "seeds",
    "tune",
    "models",
    "tasks",
    "methods",
    "lrs",
)
_CONFIGS = Path(__file__).resolve().parents[3] / "configs"
OnDone = Callable[[str, str, bool], None]


@dataclass(frozen=True, slots=True)
class Suite:
    """Models, tasks, methods and seeds, crossed; what all runs share is in ``shared`` (arguments of a cell).

    ``lrs``: a method's learning rate as it is, or a grid to tune it from; methods that are not in it have the grid of
    their own file. ``tune``: the seed, steps and problems of tuning.
    """

    title: str
    models: Mapping[str, Mapping[str, Any]]
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    shared: Mapping[str, Any]
    lrs: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, int] = field(default_factory=lambda: {"seed": 1000, "steps": 64, "problems": 256})
    all_tasks: tuple[str, ...] = ()
    """Those of the whole suite, which every start learns, whatever was chosen of them."""

    def grid(self, method: str) -> tuple[float, ...]:
        """Learning rates to choose from; one needs no tuning."""
        given = self.lrs.get(method, find("method", method).lrs)
        return tuple(float(lr) for lr in given) if isinstance(given, list | tuple) else (float(given),)

    def cells(self, lrs: Mapping[tuple[str, str], float]) -> list[Cell]:
        """All runs, with the learning rates of (model, method)."""
        return [
            Cell(
                name, settings, task, method, lrs[name, method], seed,
                others=tuple(t for t in self.all_tasks if t != task), **self.shared,
            )
            for seed in self.seeds for name, settings in self.models.items() for task in self.tasks
            for method in self.methods
        ]  # fmt: skip

    def tuning(self) -> list[Cell]:
        """Runs that only serve to choose learning rates."""
        shared = {**self.shared, "steps": self.tune["steps"], "problems": self.tune["problems"]}
        return [
            Cell(name, settings, task, method, lr, self.tune["seed"], part="tune", **shared)
            for name, settings in self.models.items() for method in self.methods for lr in self.grid(method)
            if len(self.grid(method)) > 1 for task in self.tasks
        ]  # fmt: skip

    def chosen(
        self, *, models: Sequence[str] = (), tasks: Sequence[str] = (), methods: Sequence[str] = (),
        seeds: Sequence[int] = (),
    ) -> Suite:  # fmt: skip
        """The suite with some of its models, tasks, methods and seeds only; methods and tasks may be others' files.

        Raises:
            MisuseError: an unknown name.
        """
        for name in models:
            if name not in self.models:
                raise MisuseError(f"there is no model {name[:60]!r} in the suite; there are {', '.join(self.models)}")
        for kind, given in (("task", tasks), ("method", methods)):
            for name in given:
                find(kind, name)  # type: ignore[arg-type]
        added = tuple(task for task in tasks if task not in self.all_tasks)
        return replace(
            self, models={n: s for n, s in self.models.items() if not models or n in models},
            tasks=tuple(tasks) or self.tasks, methods=tuple(methods) or self.methods, seeds=tuple(seeds) or self.seeds,
            all_tasks=self.all_tasks + added,
        )  # fmt: skip


def suite_of(values: Mapping[str, Any]) -> Suite:
    """A suite from the mapping of its configuration.

    Raises:
        MisuseError: an unknown key, method or task (near names are told), or a list that is empty or no list.
    """
    unknown = [key for key in values if key not in _KEYS]
    if unknown:
        raise MisuseError(f"there is no key {unknown[0]!r} in a suite; there are {', '.join(_KEYS)}")
    lists = {}
    for key in ("tasks", "methods", "seeds"):
        given = values.get(key)
        if not isinstance(given, list) or not given or len(set(map(str, given))) < len(given):
            raise MisuseError(f"{key} of a suite is a list, has one entry at least, and none twice")
        lists[key] = tuple(given)
    models = values.get("models")
    if not isinstance(models, Mapping) or not models or not all(isinstance(m, Mapping) for m in models.values()):
        raise MisuseError("models of a suite is a mapping of names to settings, such as {hidden: 128, layers: 3}")
    if not all(isinstance(seed, int) and seed >= 0 for seed in lists["seeds"]):
        raise MisuseError("seeds are whole numbers from 0")
    lrs, tune = dict(values.get("lrs", {})), dict(values.get("tune", {}))
    for name in (*lists["methods"], *lrs):
        find("method", str(name))
    for name in lists["tasks"]:
        find("task", str(name))
    shared = {key: values[key] for key in ("algorithm", "steps", "prompts", "group", "problems") if key in values}
    suite = Suite(
        str(values.get("title", "")), {n: dict(m) for n, m in models.items()}, lists["tasks"], lists["methods"],
        lists["seeds"], shared, lrs, {"seed": 1000, "steps": 64, "problems": 256, **tune}, lists["tasks"],
    )  # fmt: skip
    if suite.tune["seed"] in suite.seeds:
        raise MisuseError(f"the seed {suite.tune['seed']} of tuning is one of the runs' seeds; take another")
    return suite


def read_suite(name: str) -> Suite:
    """The suite of a name (``small``, ``middle``, ``hub``: ``configs/sparserl-NAME.yaml``) or of a YAML file's path.

    Raises:
        MisuseError, MalformedError: there is no such suite, or it is none.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _CONFIGS / f"sparserl-{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem.removeprefix("sparserl-") for p in _CONFIGS.glob("sparserl-*.yaml"))
        raise MisuseError(
            f"there is no suite {name!r}; there are {', '.join(known) or 'none here'}, or give a YAML file"
        )
    return suite_of(read_mapping(path, extra="study"))


def cell_id(cell: Cell) -> str:
    """Twelve hex digits that stand for all that the cell's result depends on."""
    facts = json.dumps([SCHEMA, asdict(cell)], sort_keys=True)
    return hashlib.blake2s(facts.encode(), digest_size=6).hexdigest()


def _path(out: Path, cell: Cell) -> Path:
    def plain(name: str) -> str:
        return Path(name).stem if name.endswith(".py") else name

    name = f"{cell.model_name}--{plain(cell.task)}--{plain(cell.method)}--seed{cell.seed}--{cell_id(cell)}.json"
    return out / ("tuning" if cell.part == "tune" else "results") / name


def _done(path: Path) -> Result | None:
    """A whole result, or None; one that is cut off is made again."""
    with suppress(MalformedError, FileNotFoundError):
        return read_result(path)
    return None


def _make_start(item: tuple[str, Mapping[str, Any], int], tasks: Sequence[str], out: Path, problems: int) -> None:
    name, settings, seed = item
    make_start(settings, name, tasks, seed, out / "starts", problems=problems)


def _make_run(cell: Cell, out: Path) -> None:
    created, records = datetime.now(UTC).isoformat(timespec="seconds"), []
    memory = extra_memory(lambda: records.append(train(cell, out / "starts")))
    result = result_of(cell, cell_id(cell), records[0], created_at=created, memory=memory)
    path = _path(out, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as scratch:
        scratch.write_text(json.dumps(result, allow_nan=False, indent=1))


def choose_lrs(suite: Suite, out: Path) -> dict[tuple[str, str], float]:
    """By (model, method) the learning rate whose runs on the tuning seed scored best on average over the tasks.

    A run that diverged or failed counts 0; of equal ones the lower wins.
    """
    chosen: dict[tuple[str, str], float] = {}
    best: dict[tuple[str, str], float] = {}
    sums: dict[tuple[str, str, float], float] = {}
    for cell in suite.tuning():
        result = _done(_path(out, cell))
        score = 0.0 if result is None else float(result["train_info"]["scores"]["sampled"] or 0)
        key = (cell.model_name, cell.method, cell.lr)
        sums[key] = sums.get(key, 0.0) + score
    for name in suite.models:
        for method in suite.methods:
            grid = sorted(suite.grid(method))
            chosen[name, method] = grid[0]
            for lr in grid:
                score = sums.get((name, method, lr), 0.0)
                if score > best.get((name, method), -1.0):
                    chosen[name, method], best[name, method] = lr, score
    return chosen


def _work(
    pool: Pool, stage: str, work: Callable[..., None], items: Sequence[Any], names: Callable[[Any], str], out: Path,
    rest: Sequence[Any], on_done: OnDone | None,
) -> Iterator[str]:  # fmt: skip
    """Does ``work``; yields the names of what failed."""
    for item, error in pool.do(work, items, *rest):
        name = names(item)
        note = out / "failed" / f"{name}.txt"
        if error is None:
            with suppress(FileNotFoundError):
                note.unlink()
        else:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text("".join(traceback.format_exception(error)))
            yield name
        if on_done is not None:
            on_done(stage, name, error is None)


def run_suite(suite: Suite, out: Path, *, jobs: int = 2, on_done: OnDone | None = None) -> list[str]:
    """Make all of the suite that is not in ``out`` yet, ``jobs`` runs at a time (0: in this process); returns the
    names of what failed.

    ``on_done(stage, name, sound)`` is told of each ``start``, ``tuning`` run and ``run`` as it ends.

    Raises:
        MisuseError: ``jobs`` is negative.
    """
    failed: list[str] = []

    def left(cells: Sequence[Cell]) -> list[Cell]:
        return [cell for cell in cells if _done(_path(out, cell)) is None]

    def name(cell: Cell) -> str:
        return _path(out, cell).stem

    tuning = left(suite.tuning())
    seeds = [*suite.seeds, *([suite.tune["seed"]] if tuning else [])]
    starts = [(model, settings, seed) for seed in seeds for model, settings in suite.models.items()]
    problems = int(suite.shared.get("problems", 256))
    with workers(jobs) as pool:
        failed += _work(
            pool, "start", _make_start, starts, lambda s: f"start-{s[0]}-{s[2]}", out, (suite.all_tasks, out, problems),
            on_done,
        )  # fmt: skip
        failed += _work(pool, "tuning", _make_run, tuning, name, out, (out,), on_done)
        runs = left(suite.cells(choose_lrs(suite, out)))
        failed += _work(pool, "run", _make_run, runs, name, out, (out,), on_done)
    return failed
